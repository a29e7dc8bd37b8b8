"""Text that the model being trained continues, to watch it learn: lines of `samples.jsonl`.

All devices of a run take part, each computing all rows: parameters stay where training has them and are gathered layer
by layer, as in a step.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from twotower_jax import sharding
from twotower_jax.data import encode
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.parameters import Params
from twotower_jax.train import distributed
from twotower_jax.train.metrics import open_lines, writing
from twotower_jax.two_tower import TwoTower

SAMPLES = "samples.jsonl"


class Samples:
    """Continues the same prompts each time, by block diffusion; the same parameters give the same text.

    Args:
      new: tokens for each prompt.
      mesh: that the parameters lie on; None for one device.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        tokenizer: Tokenizer,
        model: TwoTower,
        prompts: tuple[str, ...],
        new: int,
        mesh: Mesh | None = None,
    ):
        self._path, self._tokenizer, self._model = workdir / SAMPLES, tokenizer, model
        self._prompts, self._new = prompts, new
        self._mesh = None if mesh is None else sharding.with_whole_rows(mesh)

    def write(self, step: int, params: Params, block_size: int, report: Callable[[str], None]) -> None:
        """Generates with the parameters of a step, reports the texts and appends them to the file.

        Every process calls it, the first one reports and writes.

        Raises:
          SaveError: if the file cannot be written.
        """
        settings = Settings(
            max_new_tokens=self._new,
            sampling=SamplingConfig(block_size=block_size, steps_per_block=block_size),
            batch_size=len(self._prompts),
        )
        prompts = encode(self._tokenizer, self._prompts)
        in_force = contextlib.nullcontext()
        if self._mesh is not None:
            in_force = jax.set_mesh(self._mesh)
            params = jax.tree.map(lambda v: jax.device_put(v, NamedSharding(self._mesh, v.sharding.spec)), params)
        try:
            with in_force:
                results = list(generate(self._model, params, prompts, settings))
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
