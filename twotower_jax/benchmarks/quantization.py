"""Weights in fewer bits: size, agreement with float32, and speed.

With --checkpoint and --rows: what a trained model makes of given text. All rows' tokens, one after another, are cut
into windows. Against the float32 model's, for each way to store weights,

    nats            the mean log-probability's negative of the windows' tokens, under the context tower (each given
                    those before it) and under the denoiser (half of the tokens of each block masked)
    Δ               the mean difference of these tokens' log-probabilities
    same            how often the most probable token is the same
    same tokens     greedy continuations of the windows' beginnings: the part before a row's first other token

Without --checkpoint: size and speed of a random model whose weights do not fit a processor's caches.

Speed is of generation in batches of one and of all prompts, in tokens per second of the clock and of the processor, the
best of --repeats runs after a first one.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import command_line, randomness
from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.quantizing import quantize_params
from twotower_jax.config import ModelConfig
from twotower_jax.data import load_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.execution import Execution
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.prompts import prompt_ids, read_prompts
from twotower_jax.parameters import Params, bind, cast, count, initialize, parameter_table
from twotower_jax.quantization import METHODS
from twotower_jax.two_tower import TwoTower

_BLOCK = 16


class Stored(NamedTuple):
    """A way to store weights: its name, what is computed in, and how matrices are quantized."""

    name: str
    dtype: str
    method: str | None


def define_flags() -> None:
    command_line.DEFINE_path("checkpoint", None, "A checkpoint of any kind; a random model without it.")
    command_line.DEFINE_path("rows", None, 'JSON Lines of text for the checkpoint: {"text": ...} or {"ids": [...]}.')
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What quantized models compute in.")
    flags.DEFINE_integer("window", 128, "Tokens of a window, a multiple of 16.", lower_bound=32)
    flags.DEFINE_integer("windows", 32, "At most so many windows.", lower_bound=1)
    flags.DEFINE_integer("prompts", 8, "Windows whose beginnings are continued.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "New tokens of each.", lower_bound=16)
    flags.DEFINE_integer("repeats", 3, "Timed runs.", lower_bound=1)


def main() -> None:
    values = flags.FLAGS
    if (values.checkpoint is None) != (values.rows is None):
        raise ValueError("--checkpoint and --rows belong together")
    ways = [Stored("float32", "float32", None), Stored("bfloat16", "bfloat16", None)]
    ways += [Stored(f"{name}, computed in {values.dtype}", values.dtype, name) for name in METHODS]
    windows = _windows() if values.checkpoint else None
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    header = ["weights", "MB", "bits per parameter"]
    if windows is not None:
        print(f"{len(windows)} windows of {values.window} tokens\n")
        header += ["context: nats", "Δ", "same", "denoiser: nats", "Δ", "same", "AR: same tokens", "diffusion"]
    header += [f"{mode} {rows}, tokens/s (of the processor)" for mode in ("AR", "diffusion")
               for rows in (f"× {n}" for n in sorted({1, values.prompts}))]  # fmt: skip
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    exact = None
    for way in ways:
        model, params = _model(way)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        cells = [way.name, f"{size / 1e6:,.1f}", f"{8 * size / count(parameter_table(model)):.2f}"]
        tokens, speeds = _generated(model, params, windows)
        if windows is not None:
            found = [*_scored(model, params, windows), *tokens]
            exact = exact or found
            cells += [cell for part in zip(found[:2], exact[:2], strict=True) for cell in _agreement(*part)]
            cells += [f"{_same_tokens(*pair):.3f}" for pair in zip(found[2:], exact[2:], strict=True)]
        print(f"| {' | '.join(cells + speeds)} |", flush=True)


def _model(way: Stored) -> tuple[TwoTower, Params]:
    execution = Execution(dtype=way.dtype, scan_layers=jax.default_backend() == "cpu")
    if flags.FLAGS.checkpoint:
        model, params, _ = load(flags.FLAGS.checkpoint, execution=execution, quantize=way.method)
    else:
        model = TwoTower(_wide_config(), execution=execution)
        params = jax.jit(lambda: initialize(parameter_table(model), randomness.key(0)))()
        if way.method is not None:
            params = quantize_params(parameter_table(model), params, METHODS[way.method])
    return model, cast(parameter_table(model), params, way.dtype)


def _wide_config() -> ModelConfig:
    """A processor's caches do not hold its matrices, nor its experts."""
    return ModelConfig(
        vocab_size=16384,
        hidden_size=1024,
        hybrid_override_pattern="MEM*E",
        mamba_num_heads=32,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        moe_shared_expert_intermediate_size=1024,
        routed_scaling_factor=2.5,
    )


def _windows() -> np.ndarray:
    values = flags.FLAGS
    if values.window % _BLOCK:
        raise ValueError(f"--window={values.window} is not a multiple of {_BLOCK}")
    rows = read_prompts(values.rows)
    tokenizer = load_tokenizer(values.checkpoint) if any("text" in row for row in rows) else None
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in prompt_ids(rows, tokenizer)])
    number = min(values.windows, ids.size // values.window)
    if number == 0:
        raise ValueError(f"{values.rows}: has {ids.size} tokens, fewer than one window of {values.window}")
    return ids[: number * values.window].reshape(number, values.window)


class Scores(NamedTuple):
    """At the scored positions: log-probabilities of the windows' tokens, and the most probable tokens."""

    log_probabilities: np.ndarray
    best: np.ndarray


def _scored(model: TwoTower, params: Params, windows: np.ndarray) -> tuple[Scores, Scores]:
    """Scores of the context tower, and of the denoiser at masked positions."""
    rng = np.random.default_rng(0)
    blocks = windows.reshape(len(windows), -1, _BLOCK)
    masked = np.argsort(rng.random(blocks.shape), axis=-1).reshape(windows.shape) < _BLOCK // 2
    noisy = np.where(masked, model.config.mask_token_id, windows).astype(np.int32)

    def scores(logits, ids):
        best = jnp.argmax(logits, axis=-1)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0], best

    @jax.jit
    def both(params, clean, noisy):
        bound, t = bind(model, params), jnp.full(len(clean), 0.5, jnp.float32)
        context = scores(bound.context_logits(clean)[:, :-1], clean[:, 1:])
        return context, scores(bound.training_logits(clean, noisy, t, _BLOCK)[0], clean)

    parts = [both(params, windows[i : i + 1], noisy[i : i + 1]) for i in range(len(windows))]
    context, denoiser = jax.tree.map(lambda *rows: np.concatenate([np.asarray(row) for row in rows]), *parts)
    return Scores(*context), Scores(*(v[masked] for v in denoiser))


def _agreement(found: Scores, exact: Scores) -> list[str]:
    drift = np.abs(found.log_probabilities - exact.log_probabilities)
    return [
        f"{-found.log_probabilities.mean():.4f}",
        f"{drift.mean():.4f}",
        f"{(found.best == exact.best).mean():.3f}",
    ]


def _generated(model: TwoTower, params: Params, windows: np.ndarray | None) -> tuple[list[list[list[int]]], list[str]]:
    """The tokens of AR and of diffusion, and their speeds."""
    values = flags.FLAGS
    given = np.random.default_rng(0).integers(4, model.config.vocab_size, (values.prompts, 32))
    prompts = (given if windows is None else windows[: values.prompts, :32]).tolist()
    # A threshold of 1 commits by count alone where speed is what counts: four evaluations per block.
    steps, threshold = (4, 1.0) if windows is None else (_BLOCK, 0.9)
    sampling = SamplingConfig(block_size=_BLOCK, steps_per_block=steps, confidence_threshold=threshold)
    tokens, speeds = [], []
    for mode in ("ar", "diffusion"):
        for rows in sorted({1, len(prompts)}):
            settings = Settings(
                mode=mode, max_new_tokens=values.new_tokens, sampling=sampling, batch_size=rows, ignore_eos=True
            )
            results, best = [], (np.inf, np.inf)
            for number in range(1 + values.repeats):
                clock, processor = time.perf_counter(), time.process_time()
                results = [r.tokens for r in generate(model, params, prompts[:rows], settings)]
                taken = time.perf_counter() - clock, time.process_time() - processor
                best = best if number == 0 else tuple(map(min, best, taken))
            speeds.append("{:,.0f} ({:,.0f})".format(*(rows * values.new_tokens / seconds for seconds in best)))
        tokens.append(results)
    return tokens, speeds


def _same_tokens(found: list[list[int]], exact: list[list[int]]) -> float:
    same = [np.cumprod(np.equal(*rows)).sum() for rows in zip(found, exact, strict=True)]
    return float(sum(same) / sum(map(len, exact)))
