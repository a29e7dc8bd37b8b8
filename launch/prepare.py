"""Makes text of any size into a folder of tokens that config.data takes.

    python launch/prepare.py --input=texts --output=DIR --tokenizer=checkpoints/start --workers=16
    python launch/prepare.py --verify=DIR

Reads .txt, .jsonl, .ndjson and .json files (all also .gz and .zst) and .parquet. The same command goes on where an
interrupted one stopped.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import os
import pathlib

from absl import flags

from twotower_jax import command_line
from twotower_jax.data.end_tokens import end_tokens
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import TRAIN, VALIDATION, Manifest, verify
from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.paths import local_path
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
_EOS = flags.DEFINE_list(
    "eos", [], "Token ids that end a text, the first of which closes every document; default: those that the folder of "
    "--tokenizer names."
)  # fmt: skip
_VERIFY = command_line.DEFINE_path(
    "verify", None, "A prepared folder to check against its recorded hashes; nothing else."
)
_OF_A_SET = _INPUT, _OUTPUT, _TOKENIZER, _TEXT_FIELD, _FRACTION, _SEED, _WORKERS, _SHARD_SIZE, _SKIP_BAD, _EOS


def main() -> None:
    if _VERIFY.value is not None:
        command_line.refuse_given(_OF_A_SET, "with --verify, which reads a prepared folder and nothing else")
        print(f"{_VERIFY.value}: {_summary(verify(_VERIFY.value))}, all as recorded")
        return
    for flag in (_INPUT, _OUTPUT, _TOKENIZER):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; only --verify goes without")
    if not _FRACTION.value:
        command_line.refuse_given([_SEED], "without --validation_fraction: no document is chosen")
    path = pathlib.Path(_TOKENIZER.value)
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


def _inputs(values: list[str]):
    """Divides values at commas, except where a file is named so."""
    for value in values:
        # Not pathlib, which raises for a list of names that is too long to be one.
        names = [value] if os.path.exists(local_path(value)) else value.split(",")
        yield from map(local_path, names)


def _summary(manifest: Manifest) -> str:
    train, held_out = manifest.total(TRAIN, "tokens"), manifest.total(VALIDATION, "tokens")
    documents = manifest.total(TRAIN, "documents") + manifest.total(VALIDATION, "documents")
    return (
        f"{train:,} tokens to train on, {held_out:,} held out, {documents:,} documents, {len(manifest.shards)} shards, "
        f"documents closed by token {manifest.end_token}"
    )


if __name__ == "__main__":
    command_line.run(main)
