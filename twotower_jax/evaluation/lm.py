"""lm_eval's model `twotower`: its requests, answered by an `Answerer`.

    import twotower_jax.evaluation
    lm_eval.simple_evaluate("twotower", "checkpoint=DIR,mode=diffusion,confidence_threshold=0.9", tasks=["gsm8k"])

A text's tokens are the checkpoint's tokenizer's without special tokens, as in launch/generate.py; one without a context
is scored after the token that begins texts. Once a chat template was applied, texts are taken for what the template
wrote: what spells a special token in them is one.
"""

import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from twotower_jax.checkpoint.load import contents, load
from twotower_jax.data import load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.evaluation.answering import Answerer, Asked, Local
from twotower_jax.evaluation.answers import Answers, fingerprint
from twotower_jax.evaluation.likelihood import Pair
from twotower_jax.evaluation.points import with_values
from twotower_jax.execution import Execution
from twotower_jax.generation.operating_point import read_operating_point
from twotower_jax.generation.placement import parse_mesh, tower_meshes
from twotower_jax.generation.settings import Settings
from twotower_jax.layout import is_small
from twotower_jax.parameters import cast, parameter_table
from twotower_jax.paths import as_path, local_path

# What a task may say of how to generate. Greedy unless it says `do_sample`.
_KWARGS = ("until", "max_gen_toks", "max_tokens", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
_MAX_GEN_TOKS = 256
_KEPT = 512  # contexts


class TwoTowerLM(TemplateLM):
    """A two-tower checkpoint for lm_eval.

    Args:
      checkpoint: what every command's --checkpoint takes.
      mode: one of generation's modes.
      batch_size: rows computed together; no answer depends on it.
      dtype, quantize, mesh: as the flags of launch/generate.py, with + between the axes of a mesh, since commas end
        arguments.
      adapter, adapter_tower: likewise, a LoRA adapter beside the weights.
      likelihood: context, bound or blockwise, see likelihood.py. likelihood_samples: of bound.
      max_gen_toks: of questions that do not say it themselves.
      max_length: tokens that a question may have; longer ones lose their beginning, and rolling windows are as long.
        None: no limit.
      answers: a file that keeps what was answered, so that an interrupted run goes on.
      progress: tell on stderr how far it is.
      device, max_batch_size: lm_eval gives them; nothing depends on them.
      options: block_size, steps_per_block, confidence_threshold, strategy, tolerance, seed, or knobs of the strategy;
        what the checkpoint's generation_config.json says holds for those left out.
    """

    def __init__(
        self,
        checkpoint: str,
        mode: str = "diffusion",
        batch_size: int | str = 8,
        *,
        dtype: str = "float32",
        quantize: str | None = None,
        mesh: str = "",
        adapter: str | None = None,
        adapter_tower: str | None = None,
        likelihood: str = "context",
        likelihood_samples: int = 32,
        max_gen_toks: int = _MAX_GEN_TOKS,
        max_length: int | None = None,
        answers: str | None = None,
        progress: bool = True,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        if str(batch_size).partition(":")[0] == "auto":
            batch_size = 8
        folder = as_path(local_path(str(checkpoint)))
        sampling = read_operating_point(folder)
        if not sampling.get("steps_per_block"):
            sampling["steps_per_block"] = sampling.get("block_size", SamplingConfig.block_size)
        base = Settings(batch_size=int(batch_size), sampling=SamplingConfig(**sampling))
        settings = with_values(base, mode, options)
        placement = tower_meshes(parse_mesh([word for word in mesh.split("+") if word]))
        scan_layers = jax.default_backend() == "cpu" and is_small(contents(folder).config)
        execution = Execution(dtype=dtype, scan_layers=scan_layers)
        places = None if placement.context is None else placement.parameter_sharding
        beside = {"adapter": adapter and local_path(adapter), "adapter_tower": adapter_tower}
        found = load(folder, execution=execution, sharding=places, quantize=quantize, **beside)
        model, params, tokenizer_folder = found
        placement.check(model.config)
        about = [fingerprint(folder), dtype, quantize, adapter and fingerprint(local_path(adapter)), adapter_tower]
        answerer = Local(
            model,
            cast(parameter_table(model), params, dtype),
            load_tokenizer(tokenizer_folder),
            settings,
            placement=placement,
            likelihood=likelihood,
            samples=int(likelihood_samples),
            answers=Answers(answers, about),
            label=mode if progress else None,
        )
        self._set_up(answerer, tokenizer_folder, int(max_gen_toks), max_length and int(max_length))

    @classmethod
    def of(
        cls,
        answerer: Answerer,
        folder: pathlib.Path | None,
        *,
        max_gen_toks: int = _MAX_GEN_TOKS,
        max_length: int | None = None,
    ) -> "TwoTowerLM":
        """The model of whoever answers. `folder` has the tokenizer's chat template; None: there is none."""
        made = object.__new__(cls)
        made._set_up(answerer, folder, max_gen_toks, max_length)
        return made

    def _set_up(
        self, answerer: Answerer, folder: pathlib.Path | None, max_gen_toks: int, max_length: int | None
    ) -> None:
        super().__init__()
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2")
        self.answerer, self._folder = answerer, folder
        self._max_gen_toks, self._max_length = max_gen_toks, max_length
        self._template: ChatTemplate | None = None
        # All questions that were to be answered by a text, and the contexts of some others, for timings.
        self.asked: list[Asked] = []
        self.contexts: list[tuple[int, ...]] = []

    # What lm_eval asks for.

    @property
    def eot_token_id(self) -> int:
        return self.answerer.prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self._folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._template.encode_text(string) if self._template else self.answerer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # Choices of a question share one tuple: a task may have tens of thousands of long ones.
        same: dict[tuple[int, ...], tuple[int, ...]] = {}
        pairs = []
        for _, context, continuation in requests:
            pair = self._cut(Pair(tuple(context), tuple(continuation)))
            pairs.append(Pair(same.setdefault(pair.context, pair.context), pair.continuation))
        self._keep(pairs)
        answers = []
        for (told, _, _), scored in zip(requests, self.answerer.score(pairs), strict=True):
            answers.append((scored.log_likelihood, scored.greedy))
            self.cache_hook.add_partial("loglikelihood", told, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            longest = self._max_length or max(1, len(ids))
            for window in get_rolling_token_windows(ids, self.prefix_token_id, longest, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((number, Pair(tuple(context), tuple(continuation))))
        self._keep([pair for _, pair in windows])
        totals = [0.0] * len(requests)
        for (number, _), scored in zip(windows, self.answerer.score([pair for _, pair in windows]), strict=True):
            totals[number] += scored.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        seen: Counter = Counter()
        asked = []
        for request in requests:
            one = self._asked(*request.args)
            asked.append(one._replace(sample=seen[one]))
            seen[one] += bool(one.temperature)
        self.asked += asked
        texts = [answer.text for answer in self.answerer.generate(asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` it ends where its last message does."""
        if self._template is None:
            if self._folder is None:
                raise ValueError("a chat template needs the checkpoint's folder: give --checkpoint=DIR")
            self._template = ChatTemplate.load(self._folder, load_tokenizer(self._folder))
        text = self._template.render(chat_history, add_generation_prompt)
        last = str(chat_history[-1]["content"]).strip()
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._folder) if chat_template else None

    # How.

    def _asked(self, prompt: str, kwargs: dict[str, Any]) -> Asked:
        """A question as lm_eval puts it."""
        if unknown := sorted(set(kwargs) - set(_KWARGS)):
            raise ValueError(f"a task's generation_kwargs: {unknown[0]} is not known; known are {', '.join(_KWARGS)}")
        until = kwargs.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens")
        most = next((int(kwargs[name]) for name in names if kwargs.get(name)), self._max_gen_toks)
        sampled = {name: kwargs[name] for name in ("temperature", "top_k", "top_p") if kwargs.get(name) is not None}
        if not kwargs.get("do_sample", bool(sampled.get("temperature"))):
            # Greedy, or the operating point's own temperature where the task does not say.
            sampled = {"temperature": 0.0} if "do_sample" in kwargs or "temperature" in kwargs else {}
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        if self._max_length is not None:
            ids = ids[-max(1, self._max_length - most) :]
        return Asked(tuple(ids), most, stop, **sampled)

    def _keep(self, pairs: Sequence[Pair]) -> None:
        """Keeps the contexts of some questions, for timings."""
        self.contexts += [pair.context for pair in pairs[: max(0, _KEPT - len(self.contexts))]]

    def _cut(self, pair: Pair) -> Pair:
        """A pair without the beginning that is too long."""
        if self._max_length is None:
            return pair
        room = max(1, self._max_length - len(pair.continuation))
        return Pair(pair.context[-room:], pair.continuation)
