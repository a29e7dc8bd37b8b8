"""What `peers` compares: a random backbone in the published layout, and the same work done by both programs.

Each program offers the same work by name. A piece of work is a function without arguments that does it once, waits for
it, and returns numbers to compare, in NumPy's arrays.
"""

import json
import pathlib
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import randomness
from twotower_jax.checkpoint.folder_writing import Tensor, write_folder
from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.plan import table_places
from twotower_jax.compiling import jit
from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.generation import Settings, generate
from twotower_jax.parameters import bind, flatten, initialize, parameter_table
from twotower_jax.train.objectives import Autoregressive, NoiseKey
from twotower_jax.train.step import merge, split
from twotower_jax.two_tower import Backbone

Work = Callable[[], np.ndarray]

BLOCK, PROMPT = 16, 32
_PATTERN = "MEMEM*" + "EMEMEM*" * 2 + "EMEM"
# Published fields of models for a laptop: 22.7 and 124 million parameters.
MODELS = {
    "a": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        hybrid_override_pattern=_PATTERN[:16],
        mamba_num_heads=8,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=4,
        chunk_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=6,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512,
        routed_scaling_factor=2.5,
    ),
    "b": ModelConfig(
        vocab_size=4096,
        hidden_size=512,
        hybrid_override_pattern=_PATTERN,
        mamba_num_heads=16,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=6,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=1024,
        routed_scaling_factor=2.5,
    ),
}


def write_backbone(config: ModelConfig, folder: pathlib.Path) -> None:
    """Writes a new folder of a single tower with random weights, float32."""
    table = parameter_table(Backbone(config, Execution(scan_layers=False)))
    flat = flatten(initialize(table, randomness.key(0)))

    def tensor(parameter, index) -> Tensor:
        array = np.asarray(flat[parameter.path][index])
        return Tensor(array.dtype, parameter.tensor_shape, lambda: parameter.to_tensor(array))

    tensors = {name: tensor(*place) for name, place in table_places(table).items()}
    # transformers keeps step sizes above time_step_min, which the published code, and this program, only draw them by.
    changed = {"architectures": ["NemotronHForCausalLM"], "tie_word_embeddings": False, "time_step_min": 0.0}
    raw = config.to_hf() | changed
    write_folder(folder, dict(sorted(tensors.items())), {"config.json": json.dumps(raw).encode()}, 2**31)


def tokens(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Random tokens (rows, length) int32."""
    return np.random.default_rng(rows).integers(4, config.vocab_size, (rows, length)).astype(np.int32)


class Ours:
    """The work by this program, compiled as its commands compile it.

    Args:
      scan_layers: see `Execution`; None for what `load` chooses.
    """

    def __init__(self, folder: pathlib.Path, scan_layers: bool | None):
        execution = None if scan_layers is None else Execution(scan_layers=scan_layers)
        self._model, self._params, _ = load(folder, execution=execution)
        self._config = self._model.config

    def forward(self, rows: int, length: int) -> Work:
        """Logits of all positions (rows, length, V)."""
        run = jit(lambda params, ids: bind(self._model, params).context_logits(ids))
        ids = tokens(self._config, rows, length)
        return lambda: np.asarray(run(self._params, ids))

    def gradient(self, rows: int, length: int) -> Work:
        """The mean loss of next tokens, whose gradient for all weights is computed."""
        objective = Autoregressive(Backbone(self._config, self._model.context_tower.execution))
        params = {"tower": self._params["context_tower"], "head": self._params["context_head"]}
        trained, frozen = split(objective, params)
        self._params = params = None  # The trained ones are copies.

        def loss(trained, frozen, ids):
            noise = NoiseKey(0, 0, jnp.arange(rows))
            examples = objective.examples(ids, jnp.ones(rows, bool), noise, 1)
            return objective.losses_of(merge(trained, frozen), examples, 1)["next_token_loss"].mean

        run, ids = jit(jax.value_and_grad(loss)), tokens(self._config, rows, length)
        return lambda: np.asarray(jax.block_until_ready(run(trained, frozen, ids))[0])

    def continuation(self, rows: int, new: int) -> Work:
        """The `new` most probable next tokens, one after another (rows, new)."""
        settings = Settings(mode="ar", max_new_tokens=new, batch_size=rows, ignore_eos=True)
        prompts = tokens(self._config, rows, PROMPT).tolist()
        return lambda: np.array([row.tokens for row in generate(self._model, self._params, prompts, settings)])

    def evaluation(self) -> tuple[Work, Work]:
        """One denoiser evaluation of a block after a prompt, and one step of AR there, both for one row."""
        params, model, length = self._params, self._model, jnp.full(1, PROMPT, jnp.int32)
        ids = tokens(self._config, 1, PROMPT)
        _, cache = jax.jit(lambda p: bind(model, p).prefill(ids, length, 256))(params)
        block = jnp.full((1, BLOCK), self._config.mask_token_id, jnp.int32)
        evaluate = jax.jit(lambda p, c: bind(model, p).denoise(block, jnp.ones(1), c))
        extend = jax.jit(lambda p, c: bind(model, p).extend(block[:, :1], jnp.ones(1, jnp.int32), c))
        return (
            lambda: np.asarray(evaluate(params, cache)),
            lambda: np.asarray(jax.block_until_ready(extend(params, cache))[0]),
        )


class Theirs:
    """The same by transformers on one thread, with the implementation of experts that it chooses."""

    def __init__(self, folder: pathlib.Path):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # It warns of names that its own code is leaving.
        torch.set_num_threads(1)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def _ids(self, rows: int, length: int):
        return self._torch.from_numpy(tokens(self._model.config, rows, length).astype(np.int64))

    def forward(self, rows: int, length: int) -> Work:
        ids, model = self._ids(rows, length), self._model.eval()

        def once() -> np.ndarray:
            with self._torch.inference_mode():
                return model(ids, use_cache=False).logits.numpy()

        return once

    def gradient(self, rows: int, length: int) -> Work:
        ids, model = self._ids(rows, length), self._model.train()

        def once() -> np.ndarray:
            model.zero_grad(set_to_none=True)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.detach().numpy()

        return once

    def continuation(self, rows: int, new: int) -> Work:
        ids, model = self._ids(rows, PROMPT), self._model.eval()

        def once() -> np.ndarray:
            # What `generate` does, without what it does besides.
            with self._torch.inference_mode():
                out = model(ids, use_cache=True, logits_to_keep=1)
                found = [out.logits[:, -1].argmax(-1, keepdim=True)]
                while len(found) < new:
                    out = model(found[-1], past_key_values=out.past_key_values, use_cache=True)
                    found.append(out.logits[:, -1].argmax(-1, keepdim=True))
                return self._torch.cat(found, 1).numpy()

        return once
