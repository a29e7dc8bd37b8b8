"""Bodies of requests to rows for the engine. A field that cannot be honored is refused, by its name."""

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from twotower_jax.config import ModelConfig
from twotower_jax.data import encode
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import STRATEGIES, SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.request import Request
from twotower_jax.generation.settings import MODES, has_blocks
from twotower_jax.serving.errors import ApiError
from twotower_jax.serving.fields import NEUTRAL, NEUTRAL_CHAT, NEUTRAL_COMPLETION, Fields, is_integer, refused, shown
from twotower_jax.serving.grammars import Grammars
from twotower_jax.serving.holding import Constraint, read_allowed, read_constraint, read_pinned, read_start
from twotower_jax.serving.limits import Limits

# Alternatives of tokens that functions are compiled for; a request gets the next, and tells as many as were asked for.
_ALTERNATIVES = (0, 1, 5, 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request that says nothing gets.

    Attributes:
      mode, max_new_tokens, tolerance, ignore_eos: as in `Settings`.
      sampling: arguments of `SamplingConfig`; without `steps_per_block` it is the block size.
      seed: None draws another for each request.
    """

    mode: str = "diffusion"
    max_new_tokens: int = 64
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 0.0
    ignore_eos: bool = False
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A body, checked.

    Attributes:
      chat: whether it is a conversation.
      prompts: token ids, one or several.
      requests: for each prompt `n` rows; none where no token is to be generated.
      n: choices of each prompt.
      logprobs: alternatives to tell of each token; None tells nothing.
      echo: the text of the prompt comes first. seed: of all rows. adapter: beside the model, if one was asked for.
    """

    chat: bool
    prompts: list[list[int]]
    requests: list[Request]
    n: int
    logprobs: int | None
    echo: bool
    seed: int
    stream: bool
    include_usage: bool
    token_ids: bool
    step_map: bool
    context_logprobs: bool
    stream_steps: bool
    adapter: str | None = None

    @property
    def places(self) -> int:
        return max(len(self.requests), len(self.prompts))

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of the prompt are told."""
        return self.echo and self.logprobs is not None


class Reader:
    """Reads bodies for one model.

    Args:
      name: under which the model is served.
      capacity: tokens of a row, prompt and answer. most_new: the most new tokens that a slot has room for, after a
        prompt of so many, in a mode, with a block size. places: rows that may be running or waiting.
      template: of conversations; a text says why there is none.
      longest_token: the most characters that a token can stand for. grammars: of its tokens.
      adapters: names of models that are adapters of this one.
    """

    def __init__(
        self,
        *,
        name: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | str,
        defaults: Defaults,
        limits: Limits,
        capacity: int,
        most_new: Callable[[int, str, int], int],
        places: int,
        longest_token: int,
        grammars: Grammars,
        adapters: Sequence[str] = (),
    ):
        self.name, self.config, self.defaults, self.limits = name, config, defaults, limits
        self.capacity, self._most_new, self.adapters = capacity, most_new, tuple(adapters)
        self._tokenizer, self._template = tokenizer, template
        self._places, self._longest_token, self._grammars = places, longest_token, grammars
        self._kinds: set[tuple] = set()
        self._block_limit = max(limits.block_size, defaults.sampling.get("block_size", 0))

    @property
    def has_template(self) -> bool:
        """Whether conversations can be read."""
        return not isinstance(self._template, str)

    # Bodies.

    def completion(self, body: Mapping[str, Any]) -> Job:
        """A request to /v1/completions.

        Raises:
          ApiError: naming the field.
        """
        fields = Fields(body)
        adapter = self._check_model(fields)
        prompts = self._prompts(fields)
        echo = fields.boolean("echo")
        logprobs = fields.integer("logprobs", None, 0, self.limits.logprobs)
        tokens = fields.integer("max_tokens", None, 0 if echo else 1)
        return self._job(fields, False, prompts, tokens, "max_tokens", logprobs, echo, adapter=adapter)

    def chat(self, body: Mapping[str, Any]) -> Job:
        """A request to /v1/chat/completions. Raises as `completion`."""
        fields = Fields(body)
        adapter = self._check_model(fields)
        prompts = [self._conversation(fields.take("messages"))]
        logprobs = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", None, 0, self.limits.logprobs)
        if top is not None and not logprobs:
            raise refused("top_logprobs", "needs logprobs to be true")
        old = fields.integer("max_tokens", None, 1)
        tokens = fields.integer("max_completion_tokens", old, 1)
        if old is not None and tokens != old:
            raise refused("max_completion_tokens", f"says {tokens}, and max_tokens {old}: give one of the two")
        name = "max_tokens" if old is not None else "max_completion_tokens"
        return self._job(fields, True, prompts, tokens, name, (top or 0) if logprobs else None, adapter=adapter)

    def tokenize(self, body: Mapping[str, Any]) -> list[int]:
        """The token ids of "prompt", a text, or of "messages"."""
        fields = Fields(body)
        self._check_model(fields)
        if "messages" in fields:
            ids = self._conversation(fields.take("messages"))
        else:
            prompt = fields.take("prompt")
            if not isinstance(prompt, str):
                raise refused("prompt", "must be a text")
            ids = self._encoded([prompt], "prompt")[0]
        fields.finish(
            {"add_special_tokens": (True, False), "add_generation_prompt": (True,), "return_token_strs": (False,)}
        )
        return ids

    def detokenize(self, body: Mapping[str, Any]) -> list[int]:
        """The checked "tokens"."""
        fields = Fields(body)
        self._check_model(fields)
        ids = fields.take("tokens")
        if not isinstance(ids, list):
            raise refused("tokens", "must be a list of token ids")
        self._check_ids(ids, "tokens")
        fields.finish({})
        return ids

    # Their parts.

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None for the model itself.

        Raises:
          ApiError: for a name that is not served.
        """
        if model == self.name:
            return None
        if model not in self.adapters:
            served = ", ".join(map(repr, (self.name, *self.adapters)))
            message = f"model: there is no {shown(model)} here; served is {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model

    def _check_model(self, fields: Fields) -> str | None:
        """The adapter asked for."""
        model = fields.take("model", self.name)
        if not isinstance(model, str):
            raise refused("model", "must be a text")
        return self.adapter(model)

    def _prompts(self, fields: Fields) -> list[list[int]]:
        """The rows of token ids that `prompt` says: a text, token ids, or a list of either."""
        given = fields.take("prompt")
        several = isinstance(given, list) and given and not all(is_integer(part) for part in given)
        parts = given if several else [given]
        if len(parts) > self._places:
            raise refused("prompt", f"holds {len(parts)} prompts; at most {self._places} are taken together")
        rows: list[list[int] | None] = []
        for part in parts:
            if not isinstance(part, list | str) or not (isinstance(part, str) or all(is_integer(v) for v in part)):
                raise refused("prompt", "must be a text, a list of token ids, or a list of texts or of lists of ids")
            if isinstance(part, list):
                self._check_length(len(part), "prompt")
                self._check_ids(part, "prompt")
            rows.append(part if isinstance(part, list) else None)
        texts = iter(self._encoded([part for part in parts if isinstance(part, str)], "prompt"))
        prompts = [next(texts) if row is None else row for row in rows]
        for ids in prompts:
            self._check_length(len(ids), "prompt")
            if not ids:
                raise refused("prompt", "is empty: the model continues at least one token")
        return prompts

    def _conversation(self, messages: Any) -> list[int]:
        if isinstance(self._template, str):
            raise refused("messages", self._template)
        if not isinstance(messages, list):
            raise refused("messages", "must be a list of messages")
        plain = [_joined(message, number) for number, message in enumerate(messages)]
        self._check_characters(
            sum(len(text) for message in plain for text in message.values() if isinstance(text, str)), "messages"
        )
        try:
            ids = self._template.encode(plain, add_generation_prompt=True).ids.tolist()
        except (ValueError, TypeError, RecursionError) as error:
            raise refused("messages", str(error)) from None
        self._check_length(len(ids), "messages")
        return ids

    def _encoded(self, texts: list[str], name: str) -> list[list[int]]:
        for text in texts:
            self._check_characters(len(text), name)
        try:
            return [ids.tolist() for ids in encode(self._tokenizer, texts)]
        except ValueError as error:
            raise refused(name, str(error)) from None

    def _check_characters(self, characters: int, name: str) -> None:
        """Refuses texts that are too long whatever their tokens are, before these are sought."""
        if characters > self.capacity * self._longest_token:
            raise refused(name, f"has {characters} characters, too many for {self.capacity} tokens", code=_TOO_LONG)

    def _check_length(self, length: int, name: str) -> None:
        if length >= self.capacity:
            message = f"has {length} tokens; with at least one new one, {self.capacity} are possible"
            raise refused(name, message, code=_TOO_LONG)

    def _check_ids(self, ids: list, name: str) -> None:
        for place, token in enumerate(ids):
            if not is_integer(token) or not 0 <= token < self.config.vocab_size:
                what = f"must be a token id in [0, {self.config.vocab_size - 1}], not {shown(token)}"
                raise refused(name, f"at {place} {what}")

    def _job(
        self,
        fields: Fields,
        chat: bool,
        prompts: list[list[int]],
        tokens: int | None,
        tokens_name: str,
        logprobs: int | None,
        echo: bool = False,
        adapter: str | None = None,
    ) -> Job:
        n = fields.integer("n", 1, 1, min(self.limits.choices, self._places))
        if fields.integer("best_of", n, 1) != n:
            raise refused("best_of", f"must be n, {n}: choices are not ranked")
        longest = max(map(len, prompts))
        if n * len(prompts) > self._places:
            message = (
                f"of {len(prompts)} prompts makes {n * len(prompts)} rows; at most {self._places} are taken together"
            )
            raise refused("n", message)
        options = fields.take("stream_options", None)
        stream, given_options = fields.boolean("stream"), options is not None
        if given_options and not isinstance(options, dict):
            raise refused("stream_options", "must be an object")
        options = Fields(options or {})
        include_usage = options.boolean("include_usage")
        options.finish({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
        if given_options and not stream:
            raise refused("stream_options", "needs stream to be true")
        stream_steps = fields.boolean("stream_steps")
        if stream_steps and not stream:
            raise refused("stream_steps", "needs stream to be true")
        mode = fields.word("mode", self.defaults.mode, MODES)
        sampling = self._sampling(fields)
        constraint = read_constraint(fields, self._grammars)
        tokens = self._new_tokens(tokens, tokens_name, longest, mode, sampling.block_size, constraint)
        seed = fields.integer("seed", self.defaults.seed, 0, 2**32 - 1)
        seed = secrets.randbelow(2**32) if seed is None else seed
        shared = {
            "mode": mode,
            "seed": seed,
            "tolerance": fields.number("tolerance", None, 0, 1),
            "stop": self._stop(fields),
            "pinned": read_pinned(fields, tokens, self._check_ids),
            "allowed": read_allowed(fields, tokens, self._check_ids) or None,
            "start": read_start(fields, tokens, self.config.mask_token_id, self._check_ids),
            "constraint": None if constraint is None else constraint.automaton,
            "logprobs": None if logprobs is None else next(most for most in _ALTERNATIVES if most >= logprobs),
            "context_logprobs": fields.boolean("return_context_logprobs"),
            "provisional": stream_steps,
            "adapter": adapter,
        }
        if shared["tolerance"] is None:
            shared["tolerance"] = self.defaults.tolerance if shared["mode"] == "speculative" else 0.0
        self._check_constraint(constraint, shared)
        ignore_eos = fields.boolean("ignore_eos", self.defaults.ignore_eos and constraint is None)
        if ignore_eos and constraint is not None:
            raise refused("ignore_eos", f"cannot be honored with {constraint.name}: an answer ends when it is complete")
        if ignore_eos:
            shared["end_tokens"] = ()
        token_ids, step_map = fields.boolean("return_token_ids"), fields.boolean("return_step_map")
        if step_map and not has_blocks(shared["mode"]):
            raise refused("return_step_map", f"has no meaning in mode {shared['mode']}, which denoises no blocks")
        if shared["context_logprobs"] and shared["mode"] == "mock_ar":
            raise refused("return_context_logprobs", "are not to be had in mode mock_ar, a check of the denoiser")
        fields.finish(NEUTRAL | (NEUTRAL_CHAT if chat else NEUTRAL_COMPLETION))
        requests = []
        try:
            for prompt in prompts if tokens else ():
                for sample in range(n):
                    one = Request(prompt=prompt, max_new_tokens=tokens, sample=sample, sampling=sampling, **shared)
                    one.check(self.config)
                    requests.append(one)
        except ValueError as error:
            raise _named(error) from None
        if requests:
            self._check_kind(requests[0])
        return Job(
            chat=chat,
            prompts=prompts,
            requests=requests,
            n=n,
            logprobs=logprobs,
            echo=echo,
            seed=seed,
            stream=stream,
            include_usage=include_usage,
            token_ids=token_ids,
            step_map=step_map,
            context_logprobs=shared["context_logprobs"],
            stream_steps=stream_steps,
            adapter=adapter,
        )

    def _check_constraint(self, constraint: Constraint | None, shared: Mapping[str, Any]) -> None:
        if constraint is None:
            return
        if shared["mode"] == "speculative":
            raise refused(
                constraint.name, "cannot be honored in mode speculative: what may follow a draft is not known"
            )
        if names := [name for name in ("pinned", "allowed", "start", "stop") if shared[name]]:
            raise refused(names[0], f"cannot be honored together with {constraint.name}")

    def _new_tokens(
        self,
        tokens: int | None,
        name: str,
        longest: int,
        mode: str,
        block_size: int,
        constraint: Constraint | None,
    ) -> int:
        """The checked number of new tokens, or as many of the default as there is room for."""
        room = min(self.capacity - longest, self._most_new(longest, mode, block_size))
        if tokens is not None and longest + tokens > self.capacity:
            message = f"{tokens} new tokens after a prompt of {longest} are more than the {self.capacity} that can be"
            raise refused(name, message, code=_TOO_LONG)
        if room < (1 if tokens is None else tokens):
            what = f"of {block_size} leaves room for {max(0, room)} new tokens after a prompt of {longest}"
            raise refused("block_size", what, code=_TOO_LONG)
        default = self.defaults.max_new_tokens
        if constraint is not None:
            default = max(default, constraint.wanted)
            if (possible := min(default, room) if tokens is None else tokens) < constraint.needed:
                raise refused(
                    name, f"{possible} new tokens are too few for {constraint.name}, which needs {constraint.needed}"
                )
        return min(default, room) if tokens is None else tokens

    def _stop(self, fields: Fields) -> tuple[str, ...]:
        given = fields.take("stop", [])
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise refused("stop", "must be a text or a list of texts")
        limits = self.limits
        if len(texts) > limits.stop_texts or any(not 0 < len(text) <= limits.stop_characters for text in texts):
            what = f"must hold at most {limits.stop_texts} texts of 1 to {limits.stop_characters} characters each"
            raise refused("stop", what)
        return tuple(dict.fromkeys(texts))

    def _sampling(self, fields: Fields) -> SamplingConfig:
        """What the body says, and for the rest the defaults that go with it."""
        values: dict[str, Any] = dict(self.defaults.sampling)
        given: dict[str, Any] = {
            "block_size": fields.integer("block_size", None, 1, self._block_limit),
            "steps_per_block": fields.integer("steps_per_block", None, 1, self.limits.steps_per_block),
            "strategy": fields.word("strategy", None, list(STRATEGIES)),
            "confidence_threshold": fields.number("confidence_threshold", None, 0, 1),
            "temperature": fields.number("temperature", None, 0, 100),
            "top_k": fields.integer("top_k", None, -1),
            "top_p": fields.number("top_p", None, 0, 1),
            "strategy_options": fields.take("strategy_options", None),
        }
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("top_k") == -1:  # As vLLM says that all are taken.
            given["top_k"] = 0
        if given.get("top_k", 0) > self.config.vocab_size:
            raise refused("top_k", f"is more than the vocabulary of {self.config.vocab_size} has")
        options = given.get("strategy_options", {})
        if not isinstance(options, dict) or not all(isinstance(v, str | int | float) for v in options.values()):
            raise refused("strategy_options", "must be an object of knobs and their values")
        if "strategy" in given and given["strategy"] != values.get("strategy", "confidence"):
            values = {name: v for name, v in values.items() if name not in ("strategy_options", *knobs("confidence"))}
        for name in options.keys() & values.keys():
            del values[name]
        if "steps_per_block" not in given and "steps_per_block" not in values:
            given["steps_per_block"] = given.get("block_size", values.get("block_size", SamplingConfig.block_size))
        values |= given
        if not values.get("temperature"):
            values |= {"top_k": 0, "top_p": 1.0}  # The most probable token is in every one of their sets.
        try:
            return SamplingConfig(**values)
        except (ValueError, TypeError, OverflowError) as error:
            if knob := next((knob for knob in options if re.search(rf"\b{re.escape(knob)}\b", str(error))), None):
                raise refused(f"strategy_options[{knob}]", str(error)) from None
            raise _named(error) from None

    def _check_kind(self, request: Request) -> None:
        """Refuses requests that would have more functions compiled than are allowed."""
        sampling, blocks = request.sampling, has_blocks(request.mode)
        fixed = tuple(v for v in dataclasses.astuple(sampling.rule) if isinstance(v, str)) if blocks else ()
        kind = (request.mode, *((sampling.block_size, sampling.strategy, *fixed) if blocks else ()))
        if kind not in self._kinds and len(self._kinds) >= self.limits.compiled:
            name = "block_size" if blocks else "mode"
            what = f"functions for {self.limits.compiled} kinds of mode, block_size and strategy are compiled already"
            raise refused(name, f"{what}; take one of those used before", code="too_many_kinds")
        self._kinds.add(kind)


_TOO_LONG = "context_length_exceeded"
# Names of fields, as messages from below have them.
_FIELDS = (
    "steps_per_block", "block_size", "confidence_threshold", "strategy", "temperature", "tolerance",
    "top_k", "top_p", "pinned", "allowed", "start", "logprobs", "stop", "seed", "mode",
)  # fmt: skip


def _named(error: Exception) -> ApiError:
    """The error for a field that a message from below is about."""
    text = str(error)
    name = next((name for name in _FIELDS if re.search(rf"\b{name}\b", text)), "strategy_options")
    return ApiError(400, text if name in text else f"{name}: {text}", param=name, code="invalid_value")


def _joined(message: Any, number: int) -> dict[str, Any]:
    """A message whose content is a text, also where it came in parts."""
    name = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused(name, 'must be an object with a "role", a text')
    known = {"role", "content", "name", "reasoning_content", "reasoning", "refusal"}
    if unknown := sorted(key for key, value in message.items() if key not in known and value is not None):
        raise refused(name, f"has {shown(unknown[0])}, which cannot be honored")
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise refused(name, "has content of another kind than text")
        content = "".join(texts)
    if not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
        raise refused(name, 'must have "content", a text')
    return {k: v for k, v in message.items() if v is not None} | {"content": content or ""}
