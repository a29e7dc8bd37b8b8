"""A small checkpoint with a tokenizer and a chat template, and task files whose right answers are known."""

import dataclasses
import json
import os
import pathlib
import tempfile

# Before `datasets` is imported: nothing is fetched, and what it keeps is the session's own.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="data-sets-of-tests-"))

import pytest
from evaluated import CHOICES, NEW, QUESTIONS
from served import SETTINGS, write_checkpoint

from twotower_jax.checkpoint.load import load
from twotower_jax.data import Decoder, encode, load_tokenizer
from twotower_jax.evaluation.answering import Local
from twotower_jax.evaluation.environment import settle_environment
from twotower_jax.evaluation.lm import TwoTowerLM
from twotower_jax.execution import Execution
from twotower_jax.generation import generate, score_ar

settle_environment()


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, random_params) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluated") / "small", random_params)


@pytest.fixture(scope="package")
def loaded(checkpoint):
    """The small model, as commands compute it, its parameters, and the folder."""
    return load(checkpoint, execution=Execution(scan_layers=True))


@pytest.fixture(scope="package")
def make_lm(loaded):
    """Makes lm_eval's model of the small one, which is loaded once: all of them share what is compiled."""

    def make(mode: str, answers=None, batch_size: int = 4, likelihood: str = "context", **options) -> TwoTowerLM:
        settings = dataclasses.replace(SETTINGS, mode=mode, batch_size=batch_size)
        tokenizer = load_tokenizer(loaded.tokenizer_folder)
        local = Local(*loaded[:2], tokenizer, settings, answers=answers, likelihood=likelihood, samples=8)
        return TwoTowerLM.of(local, loaded.tokenizer_folder, **options)

    return make


@pytest.fixture(scope="package")
def scored(loaded):
    """Σ log p of a continuation after a context, both texts, token by token under the context tower."""
    model, params, folder = loaded
    tokenizer = load_tokenizer(folder)

    def of(context: str, continuation: str) -> float:
        whole = encode(tokenizer, [context + continuation])[0].tolist()
        # Without a context it is the token that begins texts.
        count = len(encode(tokenizer, [context])[0]) if context else 1
        ids = whole if context else [model.config.bos_token_id, *whole]
        return float(score_ar(model, params, [ids])[0][count - 1 :].sum(dtype="float64"))

    return of


@pytest.fixture(scope="package")
def written(loaded) -> dict[str, list[str]]:
    """What AR and diffusion write after each question, by the engine itself: NEW tokens."""
    model, params, folder = loaded
    tokenizer = load_tokenizer(folder)
    prompts = [ids.tolist() for ids in encode(tokenizer, list(QUESTIONS))]
    found = {}
    for mode in ("ar", "diffusion"):
        settings = dataclasses.replace(SETTINGS, mode=mode, max_new_tokens=NEW)
        found[mode] = [row.text for row in generate(model, params, prompts, settings, decode=Decoder(tokenizer))]
    return found


@pytest.fixture(scope="package")
def task_files(tmp_path_factory, scored, written) -> pathlib.Path:
    """A folder of tasks: of choices (half of them right), of text with a stop text (AR three of four), and rolling."""
    folder = tmp_path_factory.mktemp("task files")
    best = [max(range(len(CHOICES)), key=lambda i: scored(q, f" {CHOICES[i]}")) for q in QUESTIONS]
    gold = [index if place % 2 else (index + 1) % len(CHOICES) for place, index in enumerate(best)]
    stop = written["ar"][0][4]
    texts = [text.split(stop)[0] for text in written["ar"]]
    texts[1] = "something else"
    rows = [
        {"question": q, "choices": list(CHOICES), "gold": g, "text": t}
        for q, g, t in zip(QUESTIONS, gold, texts, strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "stop.txt").write_text(stop)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    common = data | {"test_split": "test", "metadata": {"version": 1.0}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    choose = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold"}
    choose |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"} | mean]}
    write = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}"}
    write |= {"generation_kwargs": {"until": [stop], "max_gen_toks": NEW, "do_sample": False}}
    write |= {"metric_list": [{"metric": "exact_match"} | mean]}
    roll = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    roll |= {"metric_list": [{"metric": "bits_per_byte", "higher_is_better": False}]}
    for name, task in (("choose", choose), ("write", write), ("roll", roll)):
        # JSON is YAML.
        (folder / f"{name}_here.yaml").write_text(json.dumps(common | task | {"task": f"{name}_here"}))
    return folder
