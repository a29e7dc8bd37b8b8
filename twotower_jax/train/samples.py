"""Text that the model being trained continues, to watch it learn: lines of `samples.jsonl`."""

import json
import pathlib
from collections.abc import Callable

from tokenizers import Tokenizer

from twotower_jax.data import encode
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.parameters import Params
from twotower_jax.train.metrics import open_lines, writing
from twotower_jax.two_tower import TwoTower

SAMPLES = "samples.jsonl"


class Samples:
    """Continues the same prompts each time, by block diffusion; the same parameters give the same text."""

    def __init__(
        self, workdir: pathlib.Path, tokenizer: Tokenizer, model: TwoTower, prompts: tuple[str, ...], new: int
    ):
        self._path, self._tokenizer, self._model = workdir / SAMPLES, tokenizer, model
        self._prompts, self._new = prompts, new

    def write(self, step: int, params: Params, block_size: int, report: Callable[[str], None]) -> None:
        """Generates with the parameters of a step, reports the texts and appends them to the file.

        Raises:
          SaveError: if the file cannot be written.
        """
        settings = Settings(
            max_new_tokens=self._new,
            sampling=SamplingConfig(block_size=block_size, steps_per_block=block_size),
            batch_size=len(self._prompts),
        )
        prompts = encode(self._tokenizer, self._prompts)
        try:
            results = list(generate(self._model, params, prompts, settings))
        except FloatingPointError as error:  # No reason to end the training that this is to watch.
            report(f"no samples at step {step}: {error}")
            return
        with writing(self._path), open_lines(self._path) as file:
            for prompt, result in zip(self._prompts, results, strict=True):
                text = self._tokenizer.decode(result.tokens)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                report(f"sample: {prompt}|{text}".replace("\n", "\\n"))
