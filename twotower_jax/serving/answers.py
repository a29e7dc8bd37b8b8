"""Results to OpenAI's JSON: whole answers, and the parts of streams."""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from twotower_jax.generation.settings import Result, TokenLogprob
from twotower_jax.serving.schema import Job
from twotower_jax.serving.scoring import Scored
from twotower_jax.serving.text import Incremental, TokenTexts


@dataclasses.dataclass(frozen=True)
class Answer:
    """What all parts of one answer share.

    Attributes:
      model: its name. mask: the mask token.
    """

    job: Job
    model: str
    texts: TokenTexts
    mask: int
    identity: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: list[dict], *, part: bool = False) -> dict[str, Any]:
        """The object around choices, of a whole answer or a part of a stream."""
        if self.job.chat:
            identity, kind = f"chatcmpl-{self.identity}", "chat.completion.chunk" if part else "chat.completion"
        else:
            identity, kind = f"cmpl-{self.identity}", "text_completion"
        return {"id": identity, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, results: Sequence[Result | None], scored: Sequence[Scored] | None) -> dict[str, Any]:
        """The answer. A result is None where no token was to be generated."""
        job = self.job
        choices = [
            self._choice(index, job.prompts[index // job.n], result, None if scored is None else scored[index // job.n])
            for index, result in enumerate(results)
        ]
        answer = self.envelope(choices) | {"usage": self.usage(results), "seed": job.seed}
        # Where vLLM's clients look for it in conversations.
        return answer | {"prompt_token_ids": job.prompts[0]} if job.token_ids and len(job.prompts) == 1 else answer

    def usage(self, results: Iterable[Result | None]) -> dict[str, Any]:
        """Counts of tokens and evaluations."""
        done = [result for result in results if result is not None]
        prompt, new = sum(map(len, self.job.prompts)), sum(len(result.tokens) for result in done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "denoiser_evaluations": sum(result.denoiser_evaluations for result in done),
            "context_evaluations": sum(result.context_evaluations for result in done),
        }

    def extras(
        self,
        prompt: Sequence[int] | None,
        tokens: Sequence[int],
        step_map: Sequence[int] | None,
        context_logprobs: Sequence[float] | None,
    ) -> dict:
        """The fields of a choice that only we have, and only if asked for."""
        found: dict[str, Any] = {}
        if self.job.token_ids:
            found["token_ids"] = list(tokens)
            if prompt is not None:
                found["prompt_token_ids"] = list(prompt)
        if self.job.step_map:
            found["step_map"] = list(step_map or ())
        if self.job.context_logprobs:
            found["context_logprobs"] = list(context_logprobs or ())
        return found

    def logprobs(self, told: Sequence[TokenLogprob | None], tokens: Sequence[int], offsets: "Offsets") -> dict | None:
        """What the model thought of tokens, in the form of either route; None if nobody asked."""
        if self.job.logprobs is None:
            return None
        top = [None if one is None else one.top[: self.job.logprobs] for one in told]
        if self.job.chat:
            rows = zip(tokens, told, top, strict=True)
            content = [
                self._entry(t, one.logprob) | {"top_logprobs": [self._entry(*p) for p in best]} for t, one, best in rows
            ]
            return {"content": content, "refusal": None}
        names = [self.texts.text(token) for token in tokens]
        best = []
        for one, pairs in zip(told, top, strict=True):
            if one is None or not self.job.logprobs:
                best.append(None)
                continue
            # The token itself is told, too, as clients expect that look whether it was the best.
            best.append(
                {self.texts.text(token): value for token, value in pairs} | {self.texts.text(one.token): one.logprob}
            )
        return {
            "tokens": names,
            "token_logprobs": [None if one is None else one.logprob for one in told],
            "top_logprobs": best if self.job.logprobs else None,
            "text_offset": offsets.of(tokens),
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = self.texts.bytes(token)
        return {"token": self.texts.text(token), "logprob": logprob, "bytes": None if found is None else list(found)}

    def _choice(self, index: int, prompt: list[int], result: Result | None, scored: Scored | None) -> dict[str, Any]:
        job = self.job
        tokens = [] if result is None else result.tokens
        told = list((result and result.logprobs) or ())
        reason = finish_reason(result)
        choice: dict[str, Any] = {"index": index, "finish_reason": reason}
        text = "" if result is None else result.text
        if job.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = self.texts.decode(prompt) + text if job.echo else text
        shown = [*prompt, *tokens] if job.echo else tokens
        choice["logprobs"] = self.logprobs([*(scored or ()), *told], shown, Offsets(self.texts))
        about = (None, None) if result is None else (result.step_map, result.context_logprobs)
        return choice | self.extras(prompt, tokens, *about)


class Offsets:
    """Where tokens begin in the text of a choice."""

    def __init__(self, texts: TokenTexts):
        self._text = Incremental(texts)

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Where the next tokens begin. One that completes a character begins where the character does."""
        places = []
        for token in tokens:
            places.append(self._text.length)
            self._text.push([token])
        return places


def finish_reason(result: Result | None) -> str:
    """OpenAI's word for why a row ended."""
    return "length" if result is None or result.finish_reason == "length" else "stop"
