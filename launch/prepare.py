"""Makes text of any size into a folder of tokens that config.data takes.

    python launch/prepare.py --input=texts --output=DIR --tokenizer=checkpoints/start --workers=16
    python launch/prepare.py --verify=DIR
    python launch/prepare.py --report=DIR --output=FOLDER
    python launch/prepare.py --sample_from=CHECKPOINT --input=texts --output=DIR --prompt_tokens=32

Reads .txt, .jsonl, .ndjson, .json and .tar files (all also .gz and .zst) and .parquet. The same command goes on where
an interrupted one stopped. The last one makes a set of what a checkpoint's context tower writes itself, each text's
first tokens continued token by token; it appears whole or not at all.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import contextlib
import os
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags

from twotower_jax import command_line
from twotower_jax.atomic import new_folder
from twotower_jax.data.duplicates import KINDS
from twotower_jax.data.end_tokens import end_tokens
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import TRAIN, VALIDATION, Manifest, verify
from twotower_jax.data.sampled import SampleSettings, text_prompts, write_sampled
from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.files import check_folder
from twotower_jax.paths import as_path, is_address, local_path
from twotower_jax.tokens import parse_ids

_DEFAULTS = Settings()
_INPUT = flags.DEFINE_multi_string(
    "input", [], "A file, a folder or a pattern in quotes; several with commas between them or by repeating the flag."
)
_OUTPUT = command_line.DEFINE_path("output", None, "The folder to make, or to go on with.")
_TOKENIZER = command_line.DEFINE_path(
    "tokenizer", None, "A tokenizer.json, or a folder that holds one: a checkpoint, a workdir, a Hugging Face folder."
)
_TEXT_FIELD = flags.DEFINE_string("text_field", _DEFAULTS.text_field, "Field, or column, of a row that holds its text.")
_FRACTION = flags.DEFINE_float(
    "validation_fraction", _DEFAULTS.validation_fraction, "Chance of each document to be held out for validation."
)
_SEED = flags.DEFINE_integer("seed", _DEFAULTS.seed, "Of the choice of those documents.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", _DEFAULTS.shard_size, "Tokens in a file of the output, about.")
_SKIP_BAD = flags.DEFINE_bool("skip_bad", _DEFAULTS.skip_bad, "Leave out rows and files that are broken; count them.")
_DEDUP = flags.DEFINE_enum(
    "dedup", None, KINDS, "Copies of earlier documents to leave out: of the same text (exact), or also of one like it "
    "(near)."
)  # fmt: skip
_THRESHOLD = flags.DEFINE_float(
    "dedup_threshold", _DEFAULTS.dedup_threshold, "With near: the least Jaccard similarity of sets of n-grams."
)
_NGRAM = flags.DEFINE_integer("dedup_ngram", _DEFAULTS.dedup_ngram, "With near: words in an n-gram.")
_PERMUTATIONS = flags.DEFINE_integer(
    "dedup_permutations", _DEFAULTS.dedup_permutations, "With near: numbers of a MinHash signature."
)
_EOS = flags.DEFINE_list(
    "eos", [], "Token ids that end a text, the first of which closes every document; default: those that the folder of "
    "--tokenizer names."
)  # fmt: skip
_VERIFY = command_line.DEFINE_path(
    "verify", None, "A prepared folder to check against its recorded hashes; nothing else."
)
_REPORT = command_line.DEFINE_path(
    "report", None, "A prepared folder to tell about: documents, lengths, tokens, copies, padding. With --output also "
    "as JSON and plots, in a new folder."
)  # fmt: skip
_LENGTH = flags.DEFINE_integer("sequence_length", 8192, "With --report: tokens in a window.")
_ALIGN = flags.DEFINE_list(
    "align", ["1", "16", "32", "64"], "With it: multiples where documents kept apart begin, a run's block."
)
_TOP = flags.DEFINE_integer("top", 10, "With it: copies and tokens to list, the most frequent.", lower_bound=1)
_OF_REPORT = _LENGTH, _ALIGN, _TOP
_SAMPLE_FROM = command_line.DEFINE_path(
    "sample_from",
    None,
    "A checkpoint whose context tower continues the beginnings of the texts; its tokenizer counts.",
)
_OF_SAMPLES = SampleSettings
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", _OF_SAMPLES.prompt_tokens, "With --sample_from: tokens of each text to begin with; 0: all of it."
)
_NEW = flags.DEFINE_integer("max_new_tokens", _OF_SAMPLES.max_new_tokens, "With it: tokens to add, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", _OF_SAMPLES.temperature, "With it: 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", _OF_SAMPLES.top_k, "With it: sample among the k most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", _OF_SAMPLES.top_p, "With it: among those that hold this much; 1: all.")
_DOCUMENTS = flags.DEFINE_integer("documents", _OF_SAMPLES.documents, "With it: texts to continue; 0: all.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "With it: rows computed together; no row depends on it.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "With it: of weights and activations.")
_SAMPLED = _PROMPT_TOKENS, _NEW, _TEMPERATURE, _TOP_K, _TOP_P, _DOCUMENTS, _BATCH_SIZE, _DTYPE
_OF_NEAR = _THRESHOLD, _NGRAM, _PERMUTATIONS
_OF_TEXT = _TOKENIZER, _WORKERS, _SHARD_SIZE, _SKIP_BAD, _DEDUP, *_OF_NEAR
_TO_MAKE = _INPUT, *_OF_TEXT, _TEXT_FIELD, _FRACTION, _SEED, _EOS, _SAMPLE_FROM, *_SAMPLED
_NOTHING_ELSE = "which reads a prepared folder and nothing else"


def main() -> None:
    if _VERIFY.value is not None:
        command_line.refuse_given((*_TO_MAKE, _OUTPUT, _REPORT, *_OF_REPORT), f"with --verify, {_NOTHING_ELSE}")
        print(f"{_VERIFY.value}: {_summary(verify(_VERIFY.value))}, all as recorded")
        return
    if _REPORT.value is not None:
        command_line.refuse_given(_TO_MAKE, f"with --report, {_NOTHING_ELSE}")
        _report()
        return
    command_line.refuse_given(_OF_REPORT, "without --report")
    if _SAMPLE_FROM.value:
        _sample()
        return
    command_line.refuse_given(_SAMPLED, "without --sample_from")
    for flag in (_INPUT, _OUTPUT, _TOKENIZER):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; only --verify goes without")
    if not _FRACTION.value:
        command_line.refuse_given([_SEED], "without --validation_fraction: no document is chosen")
    if _DEDUP.value != "near":
        command_line.refuse_given(_OF_NEAR, "without --dedup=near")
    path = as_path(_TOKENIZER.value)
    folder = path.parent if path.name == "tokenizer.json" else path
    tokenizer = load_tokenizer(folder)
    ids = parse_ids(_EOS.value, "--eos") if _EOS.value else end_tokens(folder, tokenizer)
    settings = Settings(
        text_field=_TEXT_FIELD.value,
        validation_fraction=_FRACTION.value,
        seed=_SEED.value,
        shard_size=_SHARD_SIZE.value,
        skip_bad=_SKIP_BAD.value,
        end_token=ids[0],
        end_tokens=ids,
        dedup=_DEDUP.value or "",
        dedup_threshold=_THRESHOLD.value,
        dedup_ngram=_NGRAM.value,
        dedup_permutations=_PERMUTATIONS.value,
    )
    manifest = prepare(
        list(_inputs(_INPUT.value)),
        _OUTPUT.value,
        tokenizer,
        settings,
        workers=_WORKERS.value,
        tokenizer_folder=folder,
    )
    print(f"{_OUTPUT.value}: {_summary(manifest)}")


def _sample() -> None:
    """A set of what a checkpoint writes."""
    command_line.refuse_given(_OF_TEXT, "with --sample_from")
    for flag in (_INPUT, _OUTPUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; only --verify goes without")
    if is_address(_OUTPUT.value):
        raise ValueError(f"--output={_OUTPUT.value}: samples are written to a folder of this machine")
    # Here, so that text is prepared without them.
    from twotower_jax.checkpoint.load import contents, load
    from twotower_jax.checkpoint.orbax_steps import latest_step
    from twotower_jax.checkpoint.workdir import CHECKPOINTS
    from twotower_jax.diffusion import SamplingConfig
    from twotower_jax.execution import Execution
    from twotower_jax.generation import Settings as Generation
    from twotower_jax.generation.sampled import continued
    from twotower_jax.parameters import cast, parameter_table
    from twotower_jax.train.config import DTYPES

    folder, dtype = as_path(_SAMPLE_FROM.value), DTYPES[_DTYPE.value]
    contents(folder)  # says what is wrong with it
    tokenizer = load_tokenizer(folder)
    ids = parse_ids(_EOS.value, "--eos") if _EOS.value else end_tokens(folder, tokenizer)
    settings = SampleSettings(
        sample_from=str(folder),
        sample_step=latest_step(folder / CHECKPOINTS) if (folder / CHECKPOINTS).is_dir() else None,
        text_field=_TEXT_FIELD.value,
        validation_fraction=_FRACTION.value,
        end_token=ids[0],
        seed=_SEED.value,
        prompt_tokens=_PROMPT_TOKENS.value,
        documents=_DOCUMENTS.value,
        max_new_tokens=_NEW.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        dtype=_DTYPE.value,
    )
    generation = Generation(
        mode="ar",
        max_new_tokens=settings.max_new_tokens,
        sampling=SamplingConfig(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p),
        seed=settings.seed,
        eos=tuple(ids),
        batch_size=_BATCH_SIZE.value,
    )
    if os.path.lexists(_OUTPUT.value):
        raise ValueError(f"{_OUTPUT.value}: exists already; choose another output or remove it")
    prompts, files = text_prompts(list(_inputs(_INPUT.value)), tokenizer, settings)
    model, params, _ = load(folder, execution=Execution(dtype=dtype))
    documents = continued(model, cast(parameter_table(model), params, dtype), prompts, generation)
    manifest = write_sampled(_counted(documents, len(prompts)), _OUTPUT.value, tokenizer, settings, files)
    print(f"{_OUTPUT.value}: {_summary(manifest)}")


def _counted(documents: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The documents, their number shown on stderr ten times in all."""
    for done, document in enumerate(documents, 1):
        yield document
        if done % -(-count // 10) == 0 or done == count:
            print(f"{done:,} of {count:,} documents", file=sys.stderr)


def _report() -> None:
    from twotower_jax.data import report

    check_folder(as_path(_REPORT.value), "give a folder that launch/prepare.py made")
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(new_folder(as_path(_OUTPUT.value))) if _OUTPUT.value else None
        found = report.report(
            _REPORT.value,
            sequence_length=_LENGTH.value,
            aligns=command_line.numbers(_ALIGN, int, 1),
            top=_TOP.value,
        )
        if output is not None:
            report.write(found, output)
    print(report.text(found))


def _inputs(values: list[str]):
    """Divides values at commas, except where a file is named so."""
    for value in values:
        # Not pathlib, which raises for a list of names that is too long to be one.
        names = [value] if os.path.exists(local_path(value)) else value.split(",")
        yield from map(local_path, names)


def _summary(manifest: Manifest) -> str:
    train, held_out = manifest.total(TRAIN, "tokens"), manifest.total(VALIDATION, "tokens")
    documents = manifest.total(TRAIN, "documents") + manifest.total(VALIDATION, "documents")
    copies = "".join(f", {count:,} {kind} copies left out" for kind, count in (manifest.copies or {}).items())
    return (
        f"{train:,} tokens to train on, {held_out:,} held out, {documents:,} documents, {len(manifest.shards)} shards, "
        f"documents closed by token {manifest.end_token}{copies}"
    )


if __name__ == "__main__":
    command_line.run(main)
