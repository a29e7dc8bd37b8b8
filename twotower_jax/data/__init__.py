"""Text, or tokens on disk, to batches of token ids.

    sources.py     Python's own documentation
    tasks.py       questions with exact answers; task_windows.py makes windows of them
    inputs.py      the user's files of text: which there are, and what is in them, as formats.py reads it
                   (rows.py, places.py, compression.py, archives.py, parquet.py: its parts)
    tokenizer.py   byte-level BPE: train, save, load, encode
    chat.py        conversations, by the template of a chat model's tokenizer
    packing.py     documents in memory -> windows of equal length, some documents held out for validation
    conversations.py conversation_windows.py   rows of conversations -> tokens of turns -> windows of whole ones
    pipeline.py    windows -> shuffled, resumable training batches, and the validation batches

and where the data are too large for memory

    prepare.py                text files of any size -> a folder of prepared data, by several processes
    shards.py prepared.py     such a folder: one file of it, all of it
    megatron.py               .bin/.idx sets as they are
    documents.py windows.py   documents anywhere -> windows read one at a time
    mixture.py                several sources by weight (mixture_schedule.py: by weights that change over the run)
    duplicates.py             which documents are copies of others
    parts.py                  what a process of prepare.py does
    opening.py                what config.data names -> windows

Everything here runs on the host, in numpy. Nothing depends on the number of processes except the rows each one reads.
"""

from twotower_jax.data.inputs import read_documents
from twotower_jax.data.packing import PackedSequences, pack_documents
from twotower_jax.data.pipeline import TrainingData, validation_batches
from twotower_jax.data.sources import python_documentation
from twotower_jax.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    Decoder,
    encode,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

__all__ = [
    "BOS_ID",
    "Decoder",
    "EOS_ID",
    "MASK_ID",
    "PAD_ID",
    "PackedSequences",
    "TrainingData",
    "encode",
    "load_tokenizer",
    "pack_documents",
    "python_documentation",
    "read_documents",
    "save_tokenizer",
    "train_tokenizer",
    "validation_batches",
]
