"""Continues prompts with a checkpoint.

    python launch/generate.py --checkpoint=DIR --prompt="The list object"
    python launch/generate.py --checkpoint=DIR --prompts=prompts.jsonl --mode=ar --output=out.jsonl

DIR is a Hugging Face folder, a converted checkpoint, or a training workdir. Rows of a prompts file are {"text": ...} or
{"ids": [...]}; each gives one output row, in order. --mode=speculative gives what --mode=ar gives, in fewer passes if
the denoiser drafts well. --chat speaks to a chat model through its tokenizer's template: conversations of a file, rows
{"messages": [...]}, or, without one, typed turn by turn (/exit or Ctrl-D ends). --watch shows blocks filling in;
--trace=FILE writes every step down. What launch/tune.py wrote into DIR/generation_config.json takes the place of the
defaults of the flags of the same names. --adapter=DIR puts a LoRA adapter beside the weights. --mesh=expert=4,tensor=2
divides the model and the rows over devices, --separate_towers gives each tower its own.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from twotower_jax import adapter_flags, command_line, generation_flags, model_flags

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(adapter_flags)
flags.adopt_module_key_flags(generation_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "One prompt, as text.")
_PROMPTS = command_line.DEFINE_path("prompts", None, 'JSON Lines file of prompts: {"text": ...} or {"ids": [...]}.')
_CHAT = flags.DEFINE_bool(
    "chat", False, 'Prompts are conversations, {"messages": [...]}; without --prompt and --prompts they are typed.'
)
_OUTPUT = command_line.DEFINE_path("output", None, "JSON Lines file for the results; without it the texts are printed.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed together; no row's tokens depend on it.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a row, and is left out of its text; may be repeated.")
_SEPARATE_TOWERS = flags.DEFINE_bool(
    "separate_towers", False, "Each tower on a mesh of its own; without --mesh on a device of its own."
)
_WATCH = flags.DEFINE_bool("watch", False, "Show blocks filling in, on stderr.")
_TRACE = command_line.DEFINE_path("trace", None, "JSON Lines file for every step of every row.")

if __name__ == "__main__":
    command_line.read_flags()

from tokenizers import Tokenizer

from twotower_jax import model_from_flags, settings_from_flags, strategy_flags
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.generation import rehearsal
from twotower_jax.generation.conversation import EXIT, conversation_ids, read_conversations, typed_turns
from twotower_jax.generation.engine import Engine, in_order, iter_steps, start
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.prompts import prompt_ids, read_prompts
from twotower_jax.generation.rows import Progress
from twotower_jax.generation.settings import Result, Settings
from twotower_jax.generation.trace import TraceWriter
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.generation.watch import Watch
from twotower_jax.jsonl import row_writer
from twotower_jax.outputs import check_apart
from twotower_jax.parameters import Params
from twotower_jax.paths import as_path
from twotower_jax.texts import check_text
from twotower_jax.two_tower import TwoTower


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
    settings = settings_from_flags.settings(batch_size=_BATCH_SIZE.value, stop=tuple(_STOP.value))
    rows = _rows()
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
            interrupted = error  # A typed conversation: the turns that were answered stay in the output.
    if interrupted is not None:
        raise interrupted


def _generate(
    settings: Settings,
    rows: list[dict] | None,
    write: Callable[[dict], None] | None,
    write_trace: Callable[[dict], None] | None,
) -> None:
    checkpoint = as_path(model_flags.CHECKPOINT.value)
    # Read first, because a model takes long to load.
    template = ChatTemplate.load(checkpoint, load_tokenizer(checkpoint)) if _CHAT.value else None
    prompts = conversation_ids(rows, template) if rows and template else None

    @functools.cache
    def read() -> tuple[Tokenizer | None, list[Sequence[int]] | None]:
        """The tokenizer, and the prompts as ids; nothing is known of those that will be typed."""
        text = _CHAT.value or any("text" in row for row in rows)
        tokenizer = _tokenizer(checkpoint, bool(settings.stop) or text)
        return tokenizer, prompt_ids(rows, tokenizer) if rows is not None and prompts is None else prompts

    def needs(model: TwoTower, params: Params, placement: TowerMeshes) -> dict[str, int]:
        tokenizer, ids = read()
        decode = Decoder(tokenizer) if tokenizer else None
        return rehearsal.needed(model, params, ids, settings, placement, decode)

    foreseen = None if rows is None else needs
    loaded = model_from_flags.load_model(_SEPARATE_TOWERS.value, **adapter_flags.given(), needs=foreseen)
    tokenizer, ids = read()
    if rows is None:
        _warn(settings, loaded.folder)
        _converse(loaded, template, tokenizer, settings, write)
        return
    results = _results(loaded, ids, tokenizer, settings, write_trace)
    _warn(settings, loaded.folder)  # Now, when nothing can be refused any more.
    for done, (row, result) in enumerate(zip(rows, results, strict=True), 1):
        if write is None:
            _show(row, result, tokenizer)
            continue
        write(_output_row(result))
        if not _WATCH.value:
            print(f"{done}/{len(rows)} prompts", file=sys.stderr)


def _results(
    loaded: model_from_flags.Loaded,
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
    loaded: model_from_flags.Loaded,
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
    settings_from_flags.warn_of_unused()
    _warn_of_large_blocks(settings, folder)
    if settings.mode != "ar":
        advice = "--mode=ar generates with the backbone itself"
        model_from_flags.warn_if_untrained(folder, f"--mode={settings.mode}", advice)


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
