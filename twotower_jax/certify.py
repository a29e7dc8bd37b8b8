"""Numerical proof of a conversion: a checkpoint's numbers against those that the published code gave once.

`expected.safetensors` holds one forward pass of each kind, `expected_gradients.safetensors` the gradients of its loss,
`generation.json` greedy generations; `docs/guide/conversion.md` describes them. Everything is compared in float32
unless another dtype is asked for.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file

from twotower_jax import parameters
from twotower_jax.cache import Cache
from twotower_jax.diffusion import SamplingConfig, masked_loss_sum, token_log_probabilities
from twotower_jax.files import CheckpointError, read_json
from twotower_jax.generation import Settings, generate
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Params, bind, parameter_table
from twotower_jax.tokens import check_ids
from twotower_jax.two_tower import TwoTower

NUMBERS, GRADIENTS, GENERATIONS = "expected.safetensors", "expected_gradients.safetensors", "generation.json"


class Drift(NamedTuple):
    """How far an array is from the recorded one: the largest difference, and the recorded values' largest magnitude."""

    name: str
    difference: float
    magnitude: float

    def within(self, tolerance: float) -> bool:
        """Whether the difference is small, absolutely or for values of this size; never for a NaN."""
        return self.difference <= tolerance * max(1.0, self.magnitude)


class Agreement(NamedTuple):
    """How many of a recorded generation's tokens come out, and the denoiser's evaluations (None where it has none)."""

    name: str
    equal: int
    tokens: int
    evaluations: int | None
    recorded_evaluations: int | None

    @property
    def exact(self) -> bool:
        return self.equal == self.tokens and self.evaluations == self.recorded_evaluations


class Report(NamedTuple):
    """All comparisons of one checkpoint."""

    drifts: list[Drift]
    agreements: list[Agreement]

    def holds(self, tolerance: float) -> bool:
        return all(drift.within(tolerance) for drift in self.drifts) and all(a.exact for a in self.agreements)

    def text(self, tolerance: float) -> str:
        """A table, one line for each comparison, and the verdict."""
        lines = [f"{'array':28} {'largest drift':>14} {'magnitude':>10}"]
        for drift in self.drifts:
            mark = "" if drift.within(tolerance) else "  <- beyond tolerance"
            lines.append(f"{drift.name:28} {drift.difference:14.3e} {drift.magnitude:10.3g}{mark}")
        for a in self.agreements:
            mark = "" if a.exact else "  <- differs"
            counts = "" if a.evaluations is None else f", {a.evaluations} of {a.recorded_evaluations} evaluations"
            lines.append(f"{a.name:28} {a.equal} of {a.tokens} tokens{counts}{mark}")
        verdict = "agrees with" if self.holds(tolerance) else "DOES NOT AGREE with"
        return "\n".join([*lines, f"the checkpoint {verdict} the recorded numbers (tolerance {tolerance:g})"])


def certify(model: TwoTower, params: Params, recorded: pathlib.Path, *, context_only: bool = False) -> Report:
    """Runs a model and compares.

    Args:
      params: in any dtype; they are computed with as the model's execution says.
      recorded: the folder with the recorded files. What they leave out is not compared.
      context_only: leaves the denoiser out, for a model made from a single tower.

    Raises:
      CheckpointError: if what is recorded is broken or was made with another model.
    """
    expected = _numbers(recorded / NUMBERS)
    params = parameters.cast(parameter_table(model), params, model.context_tower.execution.dtype)
    try:
        drifts = [
            Drift(name, _difference(found, expected[name]), float(np.max(np.abs(expected[name]), initial=0.0)))
            for name, found in _forward(model, params, expected, context_only)
            if name in expected
        ]
        quantized = any(isinstance(v, Quantized) for v in parameters.flatten(params).values())
        if (recorded / GRADIENTS).exists() and not context_only and not quantized:
            recorded_gradients = _numbers(recorded / GRADIENTS)
            drifts.append(_gradient_drift(gradients(model, params, expected), recorded_gradients))
    except KeyError as error:
        raise CheckpointError(f"{recorded / NUMBERS}: array {error} is missing") from None
    agreements = []
    if (recorded / GENERATIONS).exists():
        agreements = list(_generations(model, params, recorded / GENERATIONS, context_only))
    return Report(drifts, agreements)


def _numbers(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _difference(found: Any, expected: np.ndarray) -> float:
    found = np.asarray(found, np.float64)
    return float(np.max(np.abs(found - expected))) if found.shape == expected.shape else float("inf")


def _forward(
    model: TwoTower, params: Params, expected: Mapping[str, np.ndarray], context_only: bool
) -> Iterator[tuple[str, Any]]:
    """The model's arrays under the names of the recorded ones, from the same inputs."""
    ids = check_ids(expected["context.ids"], model.config.vocab_size, "context.ids")

    @jax.jit
    def context(params, ids):
        bound = bind(model, params)
        return bound.context_tower.layer_outputs(ids), bound.context_logits(ids)

    hidden, logits = context(params, ids)
    for number, array in enumerate(hidden):
        yield f"context.hidden.{number:02}", array
    yield "context.logits", logits

    length = int(expected["cache.prompt_len"])
    lengths = jnp.full(ids.shape[0], length, jnp.int32)
    _, cache = jax.jit(lambda params, ids: bind(model, params).prefill(ids, lengths, length))(params, ids[:, :length])
    yield from _cache_arrays(model, cache)
    if context_only:
        return
    if "denoiser.block" in expected:
        yield from _denoiser_arrays(model, params, expected, cache)
    if "train.ids" in expected:
        yield from _training_arrays(model, params, expected)


def _denoiser_arrays(
    model: TwoTower, params: Params, expected: Mapping[str, np.ndarray], cache: Cache
) -> Iterator[tuple[str, Any]]:
    block = check_ids(expected["denoiser.block"], model.config.vocab_size, "denoiser.block")
    t = jnp.asarray(expected["denoiser.t"])

    @jax.jit
    def denoise(params, block, t, cache):
        bound = bind(model, params)
        return bound.time.embed(t), bound.time(t), bound.denoise(block, t, cache), bound.denoise(block, None, cache)

    names = ("time.embedding", "time.block", "denoiser.logits", "denoiser.logits_no_time")
    yield from zip(names, denoise(params, block, t, cache), strict=True)


def _training_arrays(model: TwoTower, params: Params, expected: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Any]]:
    clean = check_ids(expected["train.ids"], model.config.vocab_size, "train.ids")
    masked, size = expected["train.masked"], int(expected["train.block_size"])
    noisy = np.where(masked, model.config.mask_token_id, clean)
    logits = jax.jit(lambda *args: bind(model, args[0]).training_logits(*args[1:], size)[0])(
        params, clean, noisy, jnp.asarray(expected["train.t"])
    )
    yield "train.logits", logits
    yield "train.loss", masked_loss_sum(token_log_probabilities(logits, clean), masked).mean


def gradients(model: TwoTower, params: Params, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of the recorded training loss, under the names and in the orientation of a checkpoint."""
    clean, masked, t = (jnp.asarray(expected[f"train.{name}"]) for name in ("ids", "masked", "t"))
    noisy = jnp.where(masked, model.config.mask_token_id, clean)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = bind(model, params).training_logits(clean, noisy, t, int(expected["train.block_size"]))
            return masked_loss_sum(token_log_probabilities(logits, clean), masked).mean

        return jax.grad(loss)(params)

    return by_tensor_name(model, gradient(params))


def _gradient_drift(found: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]) -> Drift:
    """The worst tensor, ‖found − recorded‖ / ‖recorded‖, as if its magnitude were 1.

    Raises:
      CheckpointError: for a recorded tensor that the model does not have, or not of that shape.
    """
    for name, v in recorded.items():
        if name not in found or found[name].shape != v.shape:
            raise CheckpointError(f"{GRADIENTS}: tensor {name} {v.shape} is none of the model's")
    errors = [np.linalg.norm(found[name] - v) / max(np.linalg.norm(v), 1e-30) for name, v in recorded.items()]
    return Drift(f"gradients of {len(errors)} tensors", float(np.max(errors, initial=0.0)), 1.0)


def by_tensor_name(model: TwoTower, params: Params) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and in the orientation of a checkpoint."""
    table, tensors = parameter_table(model), {}
    for path, array in parameters.flatten(params).items():
        parameter = table[path]
        stack = np.asarray(array).reshape(parameter.tensors.size, *parameter.shape[parameter.tensors.ndim :])
        tensors.update(zip(parameter.tensors.flat, map(parameter.to_tensor, stack), strict=True))
    return tensors


def _cache_arrays(model: TwoTower, cache: Cache) -> Iterator[tuple[str, Any]]:
    """The context cache in the published layout."""
    for number, arrays in enumerate(model.context_tower.published_cache(cache).by_layer()):
        for name, array in (arrays or {}).items():
            yield f"cache.{number:02}.{name}", array


def _generations(model: TwoTower, params: Params, path: pathlib.Path, context_only: bool) -> Iterator[Agreement]:
    """Every recorded generation, done again."""
    raw = read_json(path)
    try:
        for number, case in enumerate(raw["cases"]):
            runs = [("ar", {}, case["ar"], None)] if "ar" in case else []
            if "mock_ar" in case and not context_only:
                runs.append(("mock_ar", {}, case["mock_ar"], None))
            for run in () if context_only else case.get("mask_diffusion", ()):
                sampling = {key: run[key] for key in ("block_size", "steps_per_block", "confidence_threshold")}
                runs.append(("diffusion", sampling, run["tokens"], run["denoiser_evaluations"]))
            for count, (mode, sampling, tokens, evaluations) in enumerate(runs):
                settings = Settings(
                    mode=mode, max_new_tokens=len(tokens), sampling=SamplingConfig(**sampling), ignore_eos=True
                )
                result = next(iter(generate(model, params, [case["prompt"]], settings)))
                equal = sum(a == b for a, b in zip(result.tokens, tokens, strict=True))
                found = None if evaluations is None else result.denoiser_evaluations
                yield Agreement(f"case {number}.{count} {mode}", equal, len(tokens), found, evaluations)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not recorded generations ({error!r})") from None
