"""A server as the one who answers: OpenAI's completions route, ours (launch/serve.py) or another's.

What it needs: `POST /v1/completions` with prompts as token ids and, for likelihoods, `echo` with `logprobs`; and
`POST /tokenize`, as our server and vLLM have it. Likelihoods are whatever the server tells of a prompt, the context
tower's of ours. Other servers tell nothing of evaluations: there each token counts as one.
"""

import concurrent.futures
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from twotower_jax.evaluation.answering import Answer, Asked, Counting
from twotower_jax.evaluation.answers import Answers
from twotower_jax.evaluation.likelihood import Pair, Scored

# A server that is full says when to come again.
_TRIES, _LONGEST_WAIT, _TIMEOUT = 8, 30.0, 600.0


class Served:
    """A server at one operating point.

    Args:
      base_url: with or without the route.
      fields: of every request that generates: `mode` and what differs from the server's own settings.
      together: requests at a time.
      model: its name there; None asks the server.
      prefix: the token id that texts without a context are scored after.

    Raises:
      ValueError: in one line, if the server cannot be reached or refuses.
    """

    likelihood = "context"

    def __init__(
        self,
        base_url: str,
        fields: Mapping[str, Any],
        *,
        together: int = 8,
        model: str | None = None,
        prefix: int = 1,
        answers: Answers | None = None,
        label: str | None = None,
    ):
        root = base_url.rstrip("/")
        for route in ("/v1/completions", "/v1"):
            root = root.removesuffix(route)
        self._root, self._fields, self._together = root, dict(fields), together
        self._model = model or self._ask("/v1/models", None)["data"][0]["id"]
        self._answers, self.label = Answers() if answers is None else answers, label
        self._tokens: dict[str, list[int]] = {}
        self.prefix = prefix
        self.generated: Counter = Counter()

    def encode(self, text: str) -> list[int]:
        if text not in self._tokens:
            told = self._ask("/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": False})
            self._tokens[text] = [int(token) for token in told["tokens"]]
        return self._tokens[text]

    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        keys = [self._answers.key("likelihood", self._root, self._model, pair) for pair in pairs]
        return [Scored(*found) for found in self._all("likelihood", keys, pairs, self._score)]

    def generate(self, asked: Sequence[Asked]) -> list[Answer]:
        keys = [self._answers.key("generation", self._root, self._model, self._fields, one) for one in asked]
        found = [Answer(*one) for one in self._all("generation", keys, asked, self._continue)]
        for answer in found:
            self.generated.update(tokens=answer.tokens, evaluations=answer.evaluations)
        return found

    def run(self, asked: Sequence[Asked]) -> list[Answer]:
        with concurrent.futures.ThreadPoolExecutor(self._together) as pool:
            return list(pool.map(self._continue, asked))

    def _all(self, what: str, keys: Sequence[str], asked: Sequence[Any], ask: Any) -> list[Any]:
        """The answers, those not known asked for several at a time."""
        new = {key: one for key, one in zip(keys, asked, strict=True) if self._answers.get(key) is None}
        if new:
            label = None if self.label is None else f"{self.label}: {what}"
            with Counting(label, len(new)) as count, concurrent.futures.ThreadPoolExecutor(self._together) as pool:
                waiting = {pool.submit(ask, one): key for key, one in new.items()}
                try:
                    for done in concurrent.futures.as_completed(waiting):
                        self._answers.add(waiting[done], done.result())
                        count(1)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [self._answers.get(key) for key in keys]

    def _score(self, pair: Pair) -> Scored:
        if not pair.continuation:
            return Scored(0.0, True)
        body = {"model": self._model, "prompt": [*pair.context, *pair.continuation], "max_tokens": 1, "temperature": 0}
        told = self._ask("/v1/completions", body | {"echo": True, "logprobs": 1})["choices"][0]["logprobs"]
        first, last = len(pair.context), len(pair.context) + len(pair.continuation)
        values, best = told["token_logprobs"][first:last], told["top_logprobs"][first:last]
        greedy = all(value >= max(top.values()) for value, top in zip(values, best, strict=True))
        return Scored(float(sum(values)), greedy)

    def _continue(self, one: Asked) -> Answer:
        body = {"model": self._model, "prompt": list(one.prompt), "max_tokens": one.max_new_tokens}
        body |= {"seed": one.sample, "temperature": 0.0} | self._fields
        body |= {name: value for name in ("temperature", "top_k", "top_p") if (value := getattr(one, name)) is not None}
        body |= {"stop": list(one.stop)} if one.stop else {}
        body |= {"ignore_eos": True} if one.ignore_end else {}
        told = self._ask("/v1/completions", body)
        usage = told.get("usage") or {}
        tokens = int(usage.get("completion_tokens", 0))
        evaluations = sum(usage.get(f"{tower}_evaluations", 0) for tower in ("denoiser", "context"))
        return Answer(told["choices"][0]["text"], tokens, evaluations or tokens)

    def _ask(self, route: str, body: dict[str, Any] | None) -> Any:
        headers = {"content-type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(_TRIES)):
            request = urllib.request.Request(self._root + route, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                told = error.read()
                if error.code in (429, 503) and left:
                    wait = error.headers.get("retry-after") or "1"
                    time.sleep(min(_LONGEST_WAIT, float(wait) if wait.isdigit() else 1.0))
                    continue
                raise ValueError(f"--base_url: {self._root}{route}: {error.code}: {_message(told)}") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ValueError(f"--base_url: {self._root}{route}: {error}") from None
        raise AssertionError("unreachable")


def _message(told: bytes) -> str:
    """What a server says of an error, in OpenAI's form or in another."""
    try:
        error = json.loads(told)
        error = error.get("error", error.get("detail", error)) if isinstance(error, dict) else error
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        return told.decode(errors="replace").strip()[:300]
