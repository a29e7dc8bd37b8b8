"""A folder of prepared data from documents that are token ids already, such as a checkpoint's own samples."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.atomic import new_folder
from twotower_jax.data import inputs
from twotower_jax.data.documents import DataError
from twotower_jax.data.inputs import File
from twotower_jax.data.prepared import TRAIN, VALIDATION, Manifest
from twotower_jax.data.shards import ShardWriter, size_and_sha256
from twotower_jax.data.tokenizer import EOS_ID, encode, id_range, save_tokenizer


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How a checkpoint continues texts into data; see launch/prepare.py.

    Attributes:
      sample_from: the checkpoint. sample_step: of a workdir, the step that was read.
      text_field, validation_fraction, end_token: as of `prepare.Settings`.
      seed: of sampling, and of what is held out.
      prompt_tokens: of each text, with which a document begins; 0 for all of it.
      documents: to make, from the first so many texts; 0 for one of each.
      max_new_tokens, temperature, top_k, top_p: of generation. dtype: of its weights and activations.

    Raises:
      ValueError: at construction, for values that cannot be.
    """

    sample_from: str
    sample_step: int | None = None
    text_field: str = "text"
    validation_fraction: float = 0.0
    end_token: int = EOS_ID
    seed: int = 0
    prompt_tokens: int = 32
    documents: int = 0
    max_new_tokens: int = 224
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and less than 1, not {self.validation_fraction}")
        for name in ("prompt_tokens", "documents"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


def text_prompts(
    sources: Sequence[str], tokenizer: Tokenizer, settings: SampleSettings
) -> tuple[list[np.ndarray], list[File]]:
    """How the texts of files begin, as token ids, and the files. Texts without a token are left out.

    Raises:
      ValueError: the inputs cannot be used. DataError: they are broken, or hold no text.
    """
    files, prompts = inputs.find_files(sources, settings.text_field), []
    for piece in (piece for part in inputs.divide(files, 1 << 62) for piece in part):
        for row in inputs.read_rows(piece, settings.text_field):
            if settings.documents and len(prompts) == settings.documents:
                return prompts, files
            if row.problem:
                raise DataError(row.problem)
            ids = encode(tokenizer, [row.text or ""])[0]  # "" for what an archive holds besides
            if len(ids):
                prompts.append(ids[: settings.prompt_tokens or None])
    if not prompts:
        raise DataError(f"{files[0].path} and the other inputs: no text is left to continue")
    return prompts, files


def write_sampled(
    documents: Iterable[np.ndarray],
    output: str | pathlib.Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    files: Sequence[File],
) -> Manifest:
    """Writes documents as they are, int32 token ids, into a new folder, which appears whole or not at all.

    A document is held out by the hash of its tokens and the seed.

    Args:
      files: that the documents began in.

    Raises:
      ValueError: the folder is there already, or another process is writing it. DataError: every document is held out.
      OSError: it cannot be written.
    """
    with new_folder(pathlib.Path(output)) as folder:
        dtype = np.dtype("<u2" if id_range(tokenizer) <= 1 << 16 else "<u4")
        names = {split: f"{split}-000000-000.array_record" for split in (TRAIN, VALIDATION)}
        writers: dict[str, ShardWriter] = {}
        for ids in documents:
            split = VALIDATION if _is_held_out(ids, settings) else TRAIN
            if split not in writers:
                writers[split] = ShardWriter(folder / names[split], dtype)
            writers[split].add(ids)
        if TRAIN not in writers:
            raise DataError(f"{output}: no document is left to train on; hold out fewer")
        save_tokenizer(tokenizer, folder, settings.end_token)
        manifest = Manifest(
            tokenizer_sha256=size_and_sha256(folder / "tokenizer.json")[1],
            vocab_size=id_range(tokenizer),
            dtype=dtype.name,
            settings=dataclasses.asdict(settings),
            inputs=[{"path": file.path, "size": file.size} for file in files],
            skipped=0,
            shards=[writers[split].finish(names[split], split) for split in names if split in writers],
        )
        manifest.write(folder)
    return manifest


def _is_held_out(ids: np.ndarray, settings: SampleSettings) -> bool:
    key = settings.seed.to_bytes(4, "little")
    digest = hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < settings.validation_fraction * 2**64
