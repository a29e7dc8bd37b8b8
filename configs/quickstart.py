"""The model and the recipe of launch/quickstart.py: the tasks of twotower_jax/data/tasks.py.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/tasks/backbone
    python launch/train.py --config=configs/quickstart.py --workdir=runs/tasks/denoiser \\
        --config.objective=answers --config.init_from=runs/tasks/backbone

docs/reports/miniature.md says how the checkpoint in configs/quickstart/ was made with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from twotower_jax.diffusion import TIMES, Times
from twotower_jax.parameters import bind
from twotower_jax.train.config import base_config
from twotower_jax.train.objectives import OBJECTIVES, Denoiser
from twotower_jax.train.terms import Balance
from twotower_jax.two_tower import TrainingStates


@dataclasses.dataclass(frozen=True)
class FirstLook(Times):
    """A time for each block: 1 for a part of them, all masked as a block is when a sampler first looks at it, and
    uniform for the others."""

    first: float = 0.5

    def draw(self, step_key, row_key, index, *, rows, blocks):
        time_key, first_key = jax.random.split(row_key)
        times = jax.random.uniform(time_key, (blocks,), jnp.float32, minval=self.t_min, maxval=1.0)
        return jnp.where(jax.random.uniform(first_key, (blocks,)) < self.first, 1.0, times)


TIMES.register("first_look", FirstLook())


@OBJECTIVES.register("answers")
@dataclasses.dataclass(frozen=True)
class Answers(Denoiser):
    """The denoiser's objective of rows that are one question and, in the last block, its answer: the same loss, since
    nothing counts in a question, for half of the work.

    The context tower reads the question into a cache, and the denoiser sees the answer's block alone, as in sampling.
    """

    @classmethod
    def make(cls, config, model):
        if config.sequence_length != 2 * (config.block_size or 0):
            raise ValueError(
                f"objective='answers' needs rows of one question: sequence_length={config.sequence_length} must be two "
                f"blocks, and block_size={config.block_size} half of it"
            )
        if not config.reset_at_documents:
            raise ValueError("objective='answers' needs reset_at_documents=True, which tells questions from answers")
        context_trains = config.variant.context != "frozen"
        if context_trains or config.distillation.weight or config.balance != Balance():
            raise ValueError(
                "objective='answers' trains the denoiser alone, on masked tokens alone: with a context that trains, "
                "distillation or balanced experts take objective='denoiser'"
            )
        return super().make(config, model)

    def losses_of(self, params, examples, block_size, validating=False):
        model = bind(self.model, params)
        question, answer = jnp.split(examples.clean, [-block_size], axis=1)  # (R, L − S) and (R, S)
        length = question.shape[1]
        # A question ends where its answer begins, after padding; the tower reads it from the left.
        first = examples.start[:, -1:]
        places = jnp.minimum(first + jnp.arange(length), length - 1)
        _, cache = model.prefill(jnp.take_along_axis(question, places, axis=1), length - first[:, 0], length)
        t = examples.t.reshape(len(answer), -1)[:, -1]
        cache = jax.lax.stop_gradient(cache)
        states, _ = model.denoiser_states(examples.noisy[:, -block_size:], t, cache)
        last = examples._replace(
            clean=answer,
            counted=examples.counted[:, -block_size:],
            start=None,
            noisy=examples.noisy[:, -block_size:],
            masked=examples.masked[:, -block_size:],
            t=t[:, None],
            weight=examples.weight.reshape(len(answer), -1)[:, -1:],
        )
        return self.losses_of_states(model, TrainingStates(states, None, None, {}), last, block_size, validating)


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 512,
            "hybrid_override_pattern": "M*-M*-",
            "mamba_num_heads": 16,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1024,
        }
    )
    config.data = "tasks:letter,spell,getters,sql,sort,add"
    config.reset_at_documents = True
    config.vocab_size = 576
    config.sequence_length = 128
    config.batch_size = 16
    config.block_size = 64
    config.unroll_layers = True
    config.diffusion.times = "first_look"
    config.steps = 1000
    config.optimizer = "muon"
    config.learning_rate = 2e-3
    config.final_learning_rate = 3e-5
    config.decay_fraction = 0.4
    config.weight_decay = 0.01
    return config
