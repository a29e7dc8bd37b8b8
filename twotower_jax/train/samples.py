"""Text that the model being trained continues, to watch it learn: lines of `samples.jsonl`, and answers to held-out
prompts.

All devices of a run take part, each computing all rows: parameters stay where training has them and are gathered layer
by layer, as in a step.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from twotower_jax import sharding
from twotower_jax.data import Decoder, encode
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Result, Settings, generate
from twotower_jax.parameters import Params
from twotower_jax.train import distributed
from twotower_jax.train.metrics import Row, open_lines, writing
from twotower_jax.two_tower import TwoTower

SAMPLES = "samples.jsonl"

# Rows that are generated together.
_BATCH = 16


class Sampler:
    """Continues prompts by block diffusion; the same parameters give the same tokens.

    Args:
      new: tokens for each prompt, at most.
      mesh: that the parameters lie on; None for one device.
    """

    def __init__(self, model: TwoTower, new: int, mesh: Mesh | None = None):
        self._model, self._new = model, new
        self._mesh = None if mesh is None else sharding.with_whole_rows(mesh)

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]], block_size: int) -> list[Result]:
        """A result for each prompt, token ids; every process calls it.

        Raises:
          FloatingPointError: if the model gives what is not finite.
        """
        settings = Settings(
            max_new_tokens=self._new,
            sampling=SamplingConfig(block_size=block_size, steps_per_block=block_size),
            batch_size=min(len(prompts), _BATCH),
        )
        in_force = contextlib.nullcontext()
        if self._mesh is not None:
            in_force = jax.set_mesh(self._mesh)
            params = jax.tree.map(lambda v: jax.device_put(v, NamedSharding(self._mesh, v.sharding.spec)), params)
        with in_force:
            return list(generate(self._model, params, prompts, settings))


class Answers:
    """Answers to held-out prompts: what they cost, and how many are those of the data.

    Args:
      turns: what is said before an answer, and that answer, token ids with the end token.
    """

    def __init__(self, tokenizer: Tokenizer, sampler: Sampler, turns: Sequence[tuple[np.ndarray, np.ndarray]]):
        self._sampler = sampler
        self._prompts = [prompt.tolist() for prompt, _ in turns]
        self._decode = Decoder(tokenizer)
        self._wanted = [self._decode(answer.tolist()).strip() for _, answer in turns]

    def measure(self, params: Params, block_size: int, report: Callable[[str], None]) -> Row:
        """`tokens_per_evaluation` of the denoiser, and `exact_answers`, the share whose text is that of the data, white
        space around it apart. Every process calls it."""
        try:
            results = self._sampler(params, self._prompts, block_size)
        except FloatingPointError as error:
            report(f"no answers are sampled: {error}")
            return {"tokens_per_evaluation": None, "exact_answers": None}
        exact = [self._decode(r.tokens).strip() == wanted for r, wanted in zip(results, self._wanted, strict=True)]
        evaluations = sum(result.denoiser_evaluations for result in results)
        tokens = sum(len(result.tokens) for result in results)
        return {"tokens_per_evaluation": tokens / evaluations, "exact_answers": sum(exact) / len(exact)}


class Samples:
    """Continues the same texts each time."""

    def __init__(self, workdir: pathlib.Path, tokenizer: Tokenizer, sampler: Sampler, prompts: tuple[str, ...]):
        self._path, self._tokenizer, self._sampler, self._prompts = workdir / SAMPLES, tokenizer, sampler, prompts

    def write(self, step: int, params: Params, block_size: int, report: Callable[[str], None]) -> None:
        """Generates with the parameters of a step, reports the texts and appends them to the file.

        Every process calls it, the first one reports and writes.

        Raises:
          SaveError: if the file cannot be written.
        """
        try:
            results = self._sampler(params, encode(self._tokenizer, self._prompts), block_size)
        except FloatingPointError as error:  # No reason to end the training that this is to watch.
            report(f"no samples at step {step}: {error}")
            return
        if not distributed.is_leader():
            return
        with writing(self._path), open_lines(self._path) as file:
            for prompt, result in zip(self._prompts, results, strict=True):
                text = self._tokenizer.decode(result.tokens)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                report(f"sample: {prompt}|{text}".replace("\n", "\\n"))
