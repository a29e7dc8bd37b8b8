"""lm_eval's model, its own tasks on local files, and its own client of a server."""

import asyncio
import json
import math
import threading

import lm_eval
import numpy as np
import pytest
from evaluated import CHOICES, NEW, QUESTIONS, asked
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from safetensors.numpy import load_file
from served import SETTINGS, listening

import twotower_jax.evaluation  # noqa: F401, registers the model
from helpers import DATA
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.evaluation.answering import Asked, Local
from twotower_jax.evaluation.answers import Answers
from twotower_jax.evaluation.likelihood import Pair
from twotower_jax.evaluation.lm import TwoTowerLM
from twotower_jax.evaluation.served import Served
from twotower_jax.evaluation.suite import Task, load_task, run_task
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.serving.start import make_service


def pairs() -> list[tuple[str, str]]:
    return [(q, f" {c}") for q in QUESTIONS for c in CHOICES] + [("", "The list object"), ("order ", "and")]


@pytest.fixture(scope="module")
def ar(make_lm) -> TwoTowerLM:
    return make_lm("ar")


@pytest.mark.whole
def test_lm_eval_finds_it_by_name_and_its_tasks_get_the_known_scores(checkpoint, task_files, scored):
    names = ["choose_here", "roll_here"]
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    arguments = f"checkpoint={checkpoint},mode=ar,progress=false"
    found = lm_eval.simple_evaluate(
        "twotower", arguments, tasks=names, task_manager=manager, batch_size=4, bootstrap_iters=2, device="cpu"
    )["results"]
    assert found["choose_here"]["acc,none"] == 0.5
    nats, size = sum(scored("", q) for q in QUESTIONS), sum(len(q.encode()) for q in QUESTIONS)
    assert found["roll_here"]["bits_per_byte,none"] == pytest.approx(-nats / size / math.log(2), rel=1e-5)


def test_likelihoods_are_the_context_towers_in_any_order(ar, make_lm, scored):
    requests = asked("loglikelihood", *pairs())
    found = ar.loglikelihood(requests)
    for (context, continuation), (value, _) in zip(pairs()[:-1], found, strict=False):
        assert value == pytest.approx(scored(context, continuation), abs=2e-5)
    # A space at a context's end belongs to the continuation.
    assert found[-1][0] == pytest.approx(scored("order", " and"), abs=2e-5)
    again = make_lm("ar", batch_size=3).loglikelihood(requests[::-1])[::-1]
    assert [greedy for _, greedy in again] == [greedy for _, greedy in found]
    assert [value for value, _ in again] == pytest.approx([value for value, _ in found], abs=2e-5)


def test_likelihoods_are_those_of_transformers():
    """A backbone as transformers saves it, and the logits that transformers computed of it."""
    recorded = load_file(DATA / "family" / "moe.expected.safetensors")
    lm = TwoTowerLM(str(DATA / "family" / "moe"), "ar", progress=False)
    ids, logits = recorded["ids"], recorded["logits"].astype(np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    parts = [(0, 1, 5), (0, 12, 16), (0, 12, 13), (1, 28, 29), (1, 3, 29)]
    given = [Pair(tuple(ids[row, :start].tolist()), tuple(ids[row, start:stop].tolist())) for row, start, stop in parts]
    for (row, start, stop), found in zip(parts, lm.answerer.score(given), strict=True):
        theirs, tokens = log_p[row, start - 1 : stop - 1], ids[row, start:stop]
        assert found.log_likelihood == pytest.approx(theirs[np.arange(len(tokens)), tokens].sum(), abs=2e-4)
        assert found.greedy == bool(np.all(theirs.argmax(axis=-1) == tokens))


@pytest.mark.whole(but=["blockwise"])
@pytest.mark.parametrize("kind", ["bound", "blockwise"])
def test_the_denoisers_likelihoods_are_those_of_diffusion_in_any_order(make_lm, ar, kind):
    requests = asked("loglikelihood", *pairs()[:8])
    lm, other = make_lm("diffusion", likelihood=kind), make_lm("diffusion", likelihood=kind)
    found, again = lm.loglikelihood(requests), other.loglikelihood(requests[::-1])[::-1]
    assert [value for value, _ in again] == pytest.approx([value for value, _ in found], abs=2e-5)
    assert lm.answerer.likelihood == kind and make_lm("ar", likelihood=kind).answerer.likelihood == "context"
    exact = [value for value, _ in ar.loglikelihood(requests)]
    assert all(value < 0 and abs(value - other) > 1e-3 for (value, _), other in zip(found, exact, strict=True))


def test_rolling_windows_cover_a_long_text_once(make_lm, ar):
    text = " ".join(QUESTIONS * 3)
    short = make_lm("ar", max_length=7)
    ids = short.tok_encode(text)
    (found,) = short.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    expected, before = 0.0, [short.prefix_token_id]
    for start in range(0, len(ids), 7):
        part = ids[start : start + 7]
        # The first window has the beginning of texts before it; each of the others one token, or more at the end.
        window = before if start == 0 else ids[max(0, start + len(part) - 8) : start]
        values = ar.answerer.score([Pair(tuple(window), tuple(part))])
        expected += values[0].log_likelihood
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.whole
def test_texts_are_those_of_generation_and_end_as_asked(make_lm, ar, written, task_files):
    stop = (task_files / "stop.txt").read_text()
    kwargs = {"until": [stop], "max_gen_toks": NEW, "do_sample": False, "temperature": 0.0}
    found = ar.generate_until(asked("generate_until", *((q, kwargs) for q in QUESTIONS)))
    assert found == [text.split(stop)[0] for text in written["ar"]]
    diffusion = make_lm("diffusion")
    requests = asked("generate_until", *((q, kwargs | {"until": []}) for q in QUESTIONS))
    assert diffusion.generate_until(requests) == written["diffusion"]
    assert diffusion.generate_until(requests[::-1]) == written["diffusion"][::-1]
    assert diffusion.answerer.generated["tokens"] == 2 * NEW * len(QUESTIONS)
    # Samples of one question differ, and are the same again.
    sampled = {"max_gen_toks": NEW, "do_sample": True, "temperature": 1.0}
    once, again = (diffusion.generate_until(asked("generate_until", *[("The", sampled)] * 4)) for _ in range(2))
    assert once == again and len(set(once)) == 4
    with pytest.raises(ValueError, match="generation_kwargs: beams is not known"):
        ar.generate_until(asked("generate_until", ("The", {"beams": 2})))


def test_an_interrupted_evaluation_goes_on(make_lm, tmp_path, monkeypatch):
    path, computed = tmp_path / "answers.jsonl", []
    answers = Answers(path, "this checkpoint")
    requests = asked("loglikelihood", *pairs())
    expected = make_lm("ar", answers).loglikelihood(requests[:7])
    with pytest.raises(ValueError, match="another process evaluates"):
        Answers(path, "this checkpoint")
    answers.close()
    with path.open("a") as file:
        file.write('{"key": "cut o')
    other = Answers(path, "another checkpoint")
    assert len(other) == 7 and other.key("x") != answers.key("x")
    other.close()
    answers = Answers(path, "this checkpoint")
    second = make_lm("ar", answers)
    score = Local._score
    monkeypatch.setattr(Local, "_score", lambda self, given, done: computed.append(given) or score(self, given, done))
    assert second.loglikelihood(requests)[:7] == expected
    assert [len(given) for given in computed] == [len(requests) - 7]
    answers.close()
    assert all(json.loads(line)["key"] for line in path.read_text().splitlines())


def test_conversations_are_told_by_the_template(make_lm):
    lm = make_lm("ar")
    plain = lm.tok_encode("<s>")
    text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<s>user\nhi</s><s>assistant\n"
    assert lm.apply_chat_template([{"role": "assistant", "content": " it is"}], False) == "<s>assistant\n it is"
    assert plain != [1] and lm.tok_encode(text)[0] == 1
    assert lm.tok_encode(text).count(2) == 1


class OurTokens:
    """Our tokenizer as lm_eval's client wants one, which takes it for one of tiktoken's."""

    eot_token = 1

    def __init__(self, folder):
        tokenizer = load_tokenizer(folder)
        self._decoder = Decoder(tokenizer)
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.encode_batch = lambda texts: [self.encode(text) for text in texts]

    def decode(self, ids):
        return self._decoder.spelled(ids)


@pytest.fixture(scope="module")
def server(loaded):
    """The address of a server of the small model, in a thread of its own."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    found = {}

    async def run() -> None:
        shape = {"name": "small", "slots": 4, "capacity": 64, "max_waiting": 60}
        async with listening(make_service(*loaded, SETTINGS, placement=TowerMeshes(), **shape)()) as (where, _):
            found["where"], found["end"] = where, asyncio.Event()
            started.set()
            await found["end"].wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert started.wait(60)
    yield "http://{}:{}".format(*found["where"])
    loop.call_soon_threadsafe(found["end"].set)
    thread.join()
    loop.close()


@pytest.mark.whole
def test_lm_evals_client_of_our_server_agrees_request_by_request(server, loaded, ar, make_lm):
    client = LocalCompletionsAPI(
        f"{server}/v1/completions", tokenizer_backend="none", model="small", max_retries=1, batch_size=1
    )
    client.tokenizer_backend, client.tokenized_requests = "tiktoken", True
    client.tokenizer = OurTokens(loaded.tokenizer_folder)
    requests = asked("loglikelihood", *pairs()[8:])
    theirs, ours = client.loglikelihood(requests, disable_tqdm=True), ar.loglikelihood(requests)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    assert [value for value, _ in theirs] == pytest.approx([value for value, _ in ours], abs=2e-5)
    rolled = asked("loglikelihood_rolling", *((q,) for q in QUESTIONS))
    expected = ar.loglikelihood_rolling(rolled)
    assert client.loglikelihood_rolling(rolled, disable_tqdm=True) == pytest.approx(expected, abs=2e-5)
    for mode in ("ar", "diffusion"):
        lm = make_lm(mode)
        kwargs = {"until": ["e "], "max_gen_toks": NEW, "do_sample": False, "temperature": 0.0}
        requests = [asked("generate_until", *((q, kwargs | more) for q in QUESTIONS)) for more in ({}, {"mode": mode})]
        assert client.generate_until(requests[1], disable_tqdm=True) == lm.generate_until(requests[0])


@pytest.mark.whole
def test_a_server_answers_as_a_model_of_this_process_does(server, loaded, ar, task_files):
    there = Served(server, {"mode": "ar"}, together=3)
    for name, known in (("choose_here", 0.5), ("write_here", 0.75)):
        task = Task(name, load_task(name, include_path=str(task_files)))
        here = run_task(ar, task)
        assert run_task(TwoTowerLM.of(there, None), task) == here
        assert here.metrics[here.first].value == known
    (answer,) = there.run([Asked((5, 6, 7), 6, ignore_end=True)])
    assert (answer.tokens, answer.evaluations) == (6, ar.answerer.run([Asked((5, 6, 7), 6, ignore_end=True)])[0][2])
    with pytest.raises(ValueError, match=r"/v1/completions: 400: .*strategy"):
        Served(server, {"mode": "diffusion", "strategy": "none"}).run([Asked((5,), 4)])
    with pytest.raises(ValueError, match="--base_url: http://127.0.0.1:1/v1/models: "):
        Served("http://127.0.0.1:1/v1", {})
