"""Continues prompts with a checkpoint.

    python launch/generate.py --checkpoint=DIR --prompt="The list object"
    python launch/generate.py --checkpoint=DIR --prompts=prompts.jsonl --mode=ar --output=out.jsonl

DIR is a Hugging Face folder, a converted checkpoint, or a training workdir. Rows of a prompts file are {"text": ...} or
{"ids": [...]}; each gives one output row, in order. --mode=speculative gives what --mode=ar gives, in fewer passes if
the denoiser drafts well. --chat speaks to a chat model through its tokenizer's template: conversations of a file, rows
{"messages": [...]}, or, without one, typed turn by turn (/exit or Ctrl-D ends). --watch shows blocks filling in;
--trace=FILE writes every step down. What launch/tune.py wrote into DIR/generation_config.json takes the place of the
defaults of the flags of the same names. --mesh=expert=4,tensor=2 divides the model and the rows over devices,
--separate_towers gives each tower its own.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from tokenizers import Tokenizer

from twotower_jax import command_line, model_flags, strategy_flags
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import SCHEDULES, SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.conversation import EXIT, conversation_ids, read_conversations, typed_turns
from twotower_jax.generation.engine import Engine, in_order, iter_steps, start
from twotower_jax.generation.operating_point import FILE, read_operating_point
from twotower_jax.generation.prompts import prompt_ids, read_prompts
from twotower_jax.generation.rows import Progress
from twotower_jax.generation.settings import MODES, Result, Settings
from twotower_jax.generation.trace import TraceWriter
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.generation.watch import Watch
from twotower_jax.jsonl import row_writer
from twotower_jax.outputs import check_apart
from twotower_jax.texts import check_text

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(strategy_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "One prompt, as text.")
_PROMPTS = command_line.DEFINE_path("prompts", None, 'JSON Lines file of prompts: {"text": ...} or {"ids": [...]}.')
_CHAT = flags.DEFINE_bool(
    "chat", False, 'Prompts are conversations, {"messages": [...]}; without --prompt and --prompts they are typed.'
)
_OUTPUT = command_line.DEFINE_path("output", None, "JSON Lines file for the results; without it the texts are printed.")
_MODE = flags.DEFINE_string("mode", "diffusion", f"One of {', '.join(MODES)}.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each row, a multiple of the block or not.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens denoised together; at most what was trained.")
_STEPS = flags.DEFINE_integer("steps_per_block", None, "Most denoiser evaluations per block; default: the block size.")
_THRESHOLD = flags.DEFINE_float(
    "confidence_threshold", None, "Commit tokens surer than this (strategies that have it)."
)
_SCHEDULE = flags.DEFINE_string("schedule", None, f"Of the other strategies: one of {', '.join(SCHEDULES)}.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the most probable tokens that hold this much; 1: all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed together; no row's tokens depend on it.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-text token.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a row, and is left out of its text; may be repeated.")
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.0, "Mode speculative: keep a draft at least 1 - this as probable as AR's best; 0: AR's tokens only."
)
_SEPARATE_TOWERS = flags.DEFINE_bool(
    "separate_towers", False, "Each tower on a mesh of its own; without --mesh on a device of its own."
)
_PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 512, "Prompts are read in pieces of at most this many tokens.")
_MAX_CACHE_GB = flags.DEFINE_float(
    "max_cache_gb", None, "Refuse to start if a device's caches need more; default: what it has free."
)
_WATCH = flags.DEFINE_bool("watch", False, "Show blocks filling in, on stderr.")
_TRACE = command_line.DEFINE_path("trace", None, "JSON Lines file for every step of every row.")


def _sampling_flags() -> dict:
    """Block size, steps, strategy and threshold: the flags given, then what the checkpoint says, then defaults."""
    chosen = read_operating_point(model_flags.CHECKPOINT.value)
    strategy_flag = strategy_flags.STRATEGY
    given = {flag.name: flag.value for flag in (_BLOCK_SIZE, _STEPS, strategy_flag, _THRESHOLD) if flag.present}
    options = strategy_flags.options()
    strategy = given.get("strategy", chosen.get("strategy", strategy_flag.value))
    theirs = chosen.pop("strategy_options", {}) if strategy == chosen.get("strategy", strategy) else {}
    chosen.pop("strategy_options", None)  # Of another one.
    if theirs := {knob: value for knob, value in theirs.items() if knob not in options}:
        chosen["strategy_options"] = theirs
    if options.keys() & chosen.keys() or "confidence_threshold" not in knobs(strategy):
        chosen.pop("confidence_threshold", None)  # Given as an option, or the strategy has none.
    followed = {name: value for name, value in chosen.items() if name not in given}
    if followed and _MODE.value in ("diffusion", "speculative"):
        settings = ", ".join(f"{name}={value}" for name, value in followed.items())
        print(f"{FILE} of the checkpoint: {settings}", file=sys.stderr)
    if options:
        given["strategy_options"] = theirs | options
    values = {"block_size": _BLOCK_SIZE.value, "strategy": strategy_flag.value} | chosen | given
    return {"steps_per_block": values["block_size"]} | values


def _settings() -> Settings:
    schedule = {} if _SCHEDULE.value is None else {"schedule": _SCHEDULE.value}
    sampling = SamplingConfig(
        **_sampling_flags(),
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        **schedule,
    )
    return Settings(
        mode=_MODE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=sampling,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        ignore_eos=_IGNORE_EOS.value,
        eos=model_flags.end_tokens(),
        stop=tuple(_STOP.value),
        prefill_chunk=_PREFILL_CHUNK.value,
        tolerance=_TOLERANCE.value,
        max_cache_gb=_MAX_CACHE_GB.value,
    )


def _rows() -> list[dict] | None:
    """The rows of the prompts; None if they are to be typed."""
    given = (_PROMPT.value is not None) + (_PROMPTS.value is not None)
    if _CHAT.value and not given:
        if _TRACE.value:
            raise ValueError("--trace needs the conversations at the start: give --prompts=FILE.jsonl")
        return None
    if given != 1:
        raise ValueError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    if _PROMPT.value is not None:
        text = check_text(_PROMPT.value, "--prompt")
        return [_user(text)] if _CHAT.value else [{"text": text}]
    return read_conversations(_PROMPTS.value) if _CHAT.value else read_prompts(_PROMPTS.value)


def _user(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def _tokenizer(folder, needed: bool):
    """The checkpoint's tokenizer; None if it has none and every prompt is given as ids."""
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        if needed:
            raise
        return None


def main() -> None:
    strategy_flags.register()
    settings, rows = _settings(), _rows()
    for text in settings.stop:
        check_text(text, "--stop")
    check_apart({"--output": _OUTPUT.value, "--trace": _TRACE.value}, {"--prompts": _PROMPTS.value})
    interrupted = None
    with contextlib.ExitStack() as stack:
        # Opened first, so that a path that cannot be written is known before a model is loaded.
        write, trace = (
            stack.enter_context(row_writer(path)) if path is not None else None
            for path in (_OUTPUT.value, _TRACE.value)
        )
        try:
            _generate(settings, rows, write, trace)
        except FloatingPointError as error:
            command_line.fail(f"{model_flags.CHECKPOINT.value}: {error}", command_line.BROKEN_CHECKPOINT)
        except KeyboardInterrupt as error:
            if rows is not None:
                raise
            interrupted = error  # Of a conversation that is typed: the turns that were answered stay in the output.
    if interrupted is not None:
        raise interrupted


def _generate(
    settings: Settings,
    rows: list[dict] | None,
    write: Callable[[dict], None] | None,
    write_trace: Callable[[dict], None] | None,
) -> None:
    checkpoint = pathlib.Path(model_flags.CHECKPOINT.value)
    # Read first, because a model takes long to load.
    template = ChatTemplate.load(checkpoint, load_tokenizer(checkpoint)) if _CHAT.value else None
    prompts = conversation_ids(rows, template) if rows and template else None
    loaded = model_flags.load_model(_SEPARATE_TOWERS.value)
    text = _CHAT.value or any("text" in row for row in rows)
    tokenizer = _tokenizer(loaded.folder, bool(settings.stop) or text)
    if rows is None:
        _warn(settings, loaded.folder)
        _converse(loaded, template, tokenizer, settings, write)
        return
    prompts = prompt_ids(rows, tokenizer) if prompts is None else prompts
    results = _results(loaded, prompts, tokenizer, settings, write_trace)
    _warn(settings, loaded.folder)  # Now, when nothing can be refused any more.
    for done, (row, result) in enumerate(zip(rows, results, strict=True), 1):
        if write is None:
            _show(row, result, tokenizer)
            continue
        write(_output_row(result))
        if not _WATCH.value:
            print(f"{done}/{len(rows)} prompts", file=sys.stderr)


def _results(
    loaded: model_flags.Loaded,
    prompts: list[Sequence[int]],
    tokenizer: Tokenizer | None,
    settings: Settings,
    write_trace: Callable[[dict], None] | None = None,
) -> Iterator[Result]:
    """In the order of the prompts, which are watched and traced as the flags say."""
    model, decode = loaded.model, Decoder(tokenizer) if tokenizer else None
    observed, observers = _WATCH.value or write_trace is not None, []
    options = {"record_trace": observed, "record_routing": write_trace is not None, "decode": decode}
    engine = start(model, loaded.params, prompts, settings, placement=loaded.placement, **options)
    if _WATCH.value:
        given = int(settings.mode == "speculative")
        watch = Watch(prompts, decode, model.config.mask_token_id, sys.stderr, given=given)
        observers.append(watch.show)
    if write_trace is not None:
        trace = TraceWriter(write_trace, model.config, settings, prompts, decode)
        observers.append(lambda steps: [trace.add(progress) for progress in steps])

    def run() -> Iterator[Result]:
        yield from in_order(_steps(engine, observers))
        if write_trace is not None:
            trace.finish()

    return run()


def _converse(
    loaded: model_flags.Loaded,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    settings: Settings,
    write: Callable[[dict], None] | None,
) -> None:
    """Answers what is typed, each turn with all turns before it."""
    messages = []
    print(f"type a message a line; {EXIT} or Ctrl-D ends", file=sys.stderr)
    for text in typed_turns(sys.stdin, lambda: print("> ", end="", file=sys.stderr, flush=True)):
        turn = {"role": "user", "content": text}
        try:
            prompts = conversation_ids([{"messages": [*messages, turn]}], template)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        (result,) = _results(loaded, prompts, tokenizer, settings)
        messages += [turn, {"role": "assistant", "content": result.text}]
        print(result.text, flush=True)
        if write is not None:
            write(_output_row(result))


def _steps(engine: Engine, observers: list[Callable[[list[Progress]], object]]) -> Iterator[Progress]:
    for steps in iter_steps(engine):
        for observer in observers:
            observer(steps)
        yield from steps


def _output_row(result: Result) -> dict:
    """The fields of the row that every mode has, and those of its mode."""
    fields = {name: value for name, value in result._asdict().items() if name == "text" or value is not None}
    for name in ("trace", "step_map"):
        fields.pop(name, None)
    if result.accepted_draft_tokens is not None:
        fields["acceptance_length"] = result.acceptance_length
    return fields | {"evaluations_per_token": result.evaluations_per_token}


def _warn(settings: Settings, folder: pathlib.Path) -> None:
    _warn_of_unused(settings.mode)
    _warn_of_large_blocks(settings, folder)
    if settings.mode != "ar":
        advice = "--mode=ar generates with the backbone itself"
        model_flags.warn_if_untrained(folder, f"--mode={settings.mode}", advice)


def _warn_of_unused(mode: str) -> None:
    """Says which flags were given and do nothing in this mode: scripts give the same ones in all modes."""
    of_blocks = _BLOCK_SIZE, _STEPS, _THRESHOLD, strategy_flags.STRATEGY, strategy_flags.OPTIONS, _SCHEDULE
    given = [f"--{flag.name}" for flag in of_blocks if flag.present]
    if mode in ("ar", "mock_ar") and given:
        print(f"warning: {', '.join(given)}: not looked at with --mode={mode}, token by token", file=sys.stderr)


def _warn_of_large_blocks(settings: Settings, folder: pathlib.Path) -> None:
    trained, size = trained_block_size(folder), settings.sampling.block_size
    if settings.mode in ("diffusion", "speculative") and trained is not None and size > trained:
        print(
            f"warning: --block_size={size} is more than the {trained} that the denoiser was trained with; samples of "
            "larger blocks collapse",
            file=sys.stderr,
        )


def _show(row: dict, result: Result, tokenizer) -> None:
    if _CHAT.value:
        print(result.text)
    elif tokenizer:
        prompt = row["text"] if "text" in row else tokenizer.decode(result.prompt_ids)
        print(prompt + result.text)
    else:
        print(*result.tokens)
    print(
        f"[{len(result.tokens)} tokens, {result.denoiser_evaluations} denoiser and "
        f"{result.context_evaluations} context evaluations{_drafts(result)}, ended by {result.finish_reason}]",
        file=sys.stderr,
    )


def _drafts(result: Result) -> str:
    if result.accepted_draft_tokens is None:
        return ""
    return f", {result.acceptance_length:.2f} drafted tokens kept a block"


if __name__ == "__main__":
    command_line.run(main)
