"""The trace file: everything that happened to every row, as JSON Lines, for programs that draw it.

Line 1 is the header, `{"format": "twotower_jax trace", "version": 2, …}` with the settings, the special tokens, the
number of prompts, and n_routed_experts, the E experts of a layer. Every other line has a `kind`:

    prompt  row, ids, text
    step    row, block, step, start, t, xt, tokens, confidence, committed, experts: one evaluation of the denoiser. `xt`
            and `tokens` are the block before and after it, the mask token where undecided; `confidence` is the
            probability of each position's prediction, which says nothing where xt was decided; `committed` the
            positions decided in this step, some of which a later step may mask again; `start` the place among the
            row's new tokens of the block's first position.
            `experts` has a list for each of the denoiser's layers with experts: S · k numbers in 0 … E − 1, the k
            experts that the first position was routed to, best first, then those of the second, and so on; null where
            there are none
    block   row, block, start, tokens, accepted: what the row got from the block (in ar and mock_ar, from one call).
            `block` is null for the first token of ar and speculative, which reading the prompt gives. `accepted`
            counts the leading ones that were drafted, in speculative, and is null otherwise
    result  row, tokens, finish_reason and the counts: the end of a row
    texts   texts: the text of each token id that occurs, the last line

The lines of one row are in order; rows that were generated together are mixed. In speculative mode a block's first
position is given, and is the last token of the block before; `tokens` of its steps are a draft, `block` says what
became of it. Version 1 had neither experts nor n_routed_experts.
"""

import dataclasses
from collections.abc import Callable, Sequence

from twotower_jax.config import ModelConfig
from twotower_jax.generation.rows import Progress
from twotower_jax.generation.settings import Settings
from twotower_jax.generation.stops import Decode

FORMAT, VERSION = "twotower_jax trace", 2


class TraceWriter:
    """Writes a trace, given a function that writes one line (`jsonl.row_writer`)."""

    def __init__(
        self,
        write: Callable[[dict], None],
        config: ModelConfig,
        settings: Settings,
        prompts: Sequence[Sequence[int]],
        decode: Decode | None,
    ):
        self._write, self._decode = write, decode
        self._given = int(settings.mode == "speculative")
        self._seen: set[int] = {config.mask_token_id, *config.eos_token_ids, *(settings.eos or ())}
        values = dataclasses.asdict(settings)
        write(
            {"format": FORMAT, "version": VERSION, "prompts": len(prompts)}
            | values.pop("sampling")
            | {"strategy_options": dict(settings.sampling.strategy_options)}
            | values
            | {"mask_token_id": config.mask_token_id, "eos_token_id": config.eos_token_id}
            | {"n_routed_experts": config.n_routed_experts}
        )
        for row, ids in enumerate(prompts):
            ids = [int(i) for i in ids]
            self._seen.update(ids)
            write({"kind": "prompt", "row": row, "ids": ids, "text": decode(ids) if decode else None})

    def add(self, progress: Progress) -> None:
        """Writes what a row got from a block."""
        row, start = progress.number, progress.start
        for step in progress.steps or ():
            self._seen.update(step.tokens)
            place = {"kind": "step", "row": row, "block": step.block, "step": step.step, "start": start - self._given}
            state = {"t": step.t, "xt": step.xt, "tokens": step.tokens}
            experts = (
                None if step.experts is None else [[e for chosen in layer for e in chosen] for layer in step.experts]
            )
            routing = {"committed": step.committed, "experts": experts}
            self._write(place | state | {"confidence": step.confidence} | routing)
        self._seen.update(progress.tokens)
        block = {"kind": "block", "row": row, "block": progress.block, "start": start, "tokens": progress.tokens}
        self._write(block | {"accepted": progress.accepted})
        if progress.result is not None:
            fields = progress.result._asdict()
            for name in ("trace", "prompt_ids", "logprobs", "step_map", "context_logprobs"):
                del fields[name]
            self._write({"kind": "result", "row": row} | fields)

    def finish(self) -> None:
        """Writes the last line."""
        if self._decode is not None:
            self._write({"kind": "texts", "texts": {str(i): self._decode([i]) for i in sorted(self._seen)}})
