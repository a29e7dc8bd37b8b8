"""launch/prepare.py --sample_from: documents that a checkpoint's context tower continues, as data to train on."""

import json

import numpy as np
import pytest

from helpers import run_command
from twotower_jax.checkpoint.load import load
from twotower_jax.data import encode, load_tokenizer
from twotower_jax.data.documents import DataError
from twotower_jax.data.prepared import PreparedDocuments, read_manifest, verify
from twotower_jax.data.sampled import SampleSettings, text_prompts, write_sampled
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.sampled import continued
from twotower_jax.train.setup import look
from twotower_jax.train.start import make_start

pytestmark = pytest.mark.usefixtures("compile_once")

TEXTS = ["The list object is one of them", "A context", "Run the tests with the other command of this kind"] * 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.mark.whole
def test_what_a_checkpoint_writes_is_data_to_train_on(small_folder, texts, tmp_path, train_config):
    arguments = [
        *(f"--sample_from={small_folder}", f"--input={texts}", "--prompt_tokens=4", "--max_new_tokens=12"),
        *("--temperature=0.7", "--top_k=9", "--seed=3", "--batch_size=2", "--validation_fraction=0.3"),
        f"--output={tmp_path / 'set'}",
    ]
    done = run_command("prepare", *arguments)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 documents" in done.stderr
    model, params, _ = load(small_folder)
    tokenizer = load_tokenizer(small_folder)
    prompts = [ids[:4] for ids in encode(tokenizer, TEXTS)]
    # Another batch size: no row depends on its neighbors.
    sampling = SamplingConfig(temperature=0.7, top_k=9)
    settings = Settings(mode="ar", max_new_tokens=12, sampling=sampling, seed=3, batch_size=6, eos=(2,))
    expected = [
        [*prompt, *row.tokens] for prompt, row in zip(prompts, generate(model, params, prompts, settings), strict=True)
    ]
    verify(tmp_path / "set")
    found = []
    for documents in (PreparedDocuments(tmp_path / "set", split) for split in ("train", "validation")):
        ends = np.cumsum(documents.lengths(0, documents.count))[:-1]
        found += [row.tolist() for row in np.split(documents.read(0, documents.tokens), ends)]
        assert documents.count
    assert sorted(found) == sorted([int(i) for i in row] for row in expected)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.settings["sample_from"] == str(small_folder) and manifest.settings["max_new_tokens"] == 12
    changes = {"data": str(tmp_path / "set"), "init_from": str(small_folder), "objective": "denoiser"}
    config = train_config(**changes, sequence_length=16, block_size=8, batch_size=1)
    assert len(make_start(config, look(config, tmp_path / "run")).training)
    # The folder is not written over, and what does nothing is refused.
    assert "exists already" in run_command("prepare", *arguments).stderr
    refused = run_command("prepare", *arguments, "--workers=2").stderr
    assert "--workers changes nothing with --sample_from" in refused
    refused = run_command("prepare", f"--input={texts}", f"--output={tmp_path / 'x'}", "--top_k=3").stderr
    assert "--top_k changes nothing without --sample_from" in refused


def test_nothing_is_left_of_a_set_that_fails(small_folder, texts, tmp_path):
    tokenizer, settings = load_tokenizer(small_folder), SampleSettings("here", documents=1, prompt_tokens=0)
    prompts, files = text_prompts([str(texts)], tokenizer, settings)
    assert [list(p) for p in prompts] == [list(encode(tokenizer, TEXTS[:1])[0])]

    def fails():
        yield np.int32([5, 6])
        raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError):
        write_sampled(fails(), tmp_path / "set", tokenizer, settings, files)
    assert not list(tmp_path.iterdir())
    all_held_out = SampleSettings("here", validation_fraction=0.999999)
    with pytest.raises(DataError, match="no document is left to train on"):
        write_sampled([np.int32([5, 6])], tmp_path / "set", tokenizer, all_held_out, files)
    with pytest.raises(ValueError, match="what the context tower writes is that of mode 'ar'"):
        next(continued(None, None, prompts, Settings(mode="diffusion")))
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match='line 1: the field "text" holds no text'):
        text_prompts([str(empty)], tokenizer, settings)
