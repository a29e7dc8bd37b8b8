"""Which implementation runs is a setting of the model's execution, of a training config and of a flag."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from twotower_jax import kernels
from twotower_jax.execution import Execution
from twotower_jax.kernels import Backends
from twotower_jax.parameters import bind, initialize, parameter_table
from twotower_jax.train.config import base_config, freeze
from twotower_jax.two_tower import TwoTower


def test_a_flag_names_implementations():
    assert Backends.parse([]) == Backends()
    assert Backends.parse(["ssd=reference", "expert_mlp=xla"]) == Backends(ssd="reference", expert_mlp="xla")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ssd"], "'ssd' is not of the form OP=IMPLEMENTATION"),
        (["sdd=xla"], "there is no op 'sdd'; there are ssd, "),
        (["ssd=cuda"], "ssd has no implementation 'cuda'; there are xla, "),
    ],
)
def test_a_word_that_means_nothing_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Backends.parse(words)


def test_a_training_config_carries_them_to_the_model(small_config):
    model = dataclasses.asdict(small_config())
    config = base_config({name: value for name, value in model.items() if name != "vocab_size"})
    assert freeze(config).execution.backends == Backends()
    config.kernels.ssd = "reference"
    assert freeze(config).execution.backends == Backends(ssd="reference")
    config.kernels.ssd = "cuda"
    with pytest.raises(ValueError, match="ssd has no implementation 'cuda'"):
        freeze(config)


def test_every_op_of_a_model_runs_as_it_is_told(small_config, monkeypatch):
    """In training, prefill, a denoiser's evaluation and a speculative block.

    Which implementation runs is decided while tracing, and so nothing is compiled.
    """
    ran = []
    for op in kernels.OPS.values():
        run = type(op).run

        def record(self, implementation, *args, run=run, **kwargs):
            ran.append((self.name, implementation))
            return run(self, implementation, *args, **kwargs)

    monkeypatch.setattr(type(op), "run", record)
    names = {name: "reference" if "reference" in op.implementations else "xla" for name, op in kernels.OPS.items()}
    fields = set(Backends.__dataclass_fields__)
    backends = Backends(**{name: value for name, value in names.items() if name in fields})
    model = TwoTower(small_config("M*E"), execution=Execution(backends=backends))

    def everything(params):
        bound, ids = bind(model, params), jnp.arange(8)[None] + 4
        logits = bound.training_logits(ids, ids, jnp.array([0.5]), 4)
        _, cache = bound.prefill(ids, jnp.array([8]), 16)
        denoised = bound.denoise(ids[:, :4], jnp.array([0.5]), cache)
        _, memories = bound.verify(ids[:, :4], cache)
        return logits, denoised, bound.keep(cache, memories, jnp.array([2]))

    jax.eval_shape(everything, initialize(parameter_table(model), jax.random.key(0)))
    assert {name for name, _ in ran} == set(names)
    assert all(implementation == names[name] for name, implementation in ran)
