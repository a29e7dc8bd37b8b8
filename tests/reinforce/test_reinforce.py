"""Reinforcement: the probabilities of what steps revealed, the objective against literal sums, and runs that learn."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import DATA, run_command
from twotower_jax.checkpoint.export import model_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.checkpoint.load import load
from twotower_jax.config import Variant
from twotower_jax.data import tasks
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.reinforce import policy
from twotower_jax.reinforce.loop import ReinforceConfig, reinforce
from twotower_jax.reinforce.policy import Batch, Objective
from twotower_jax.reinforce.questions import Question, from_file, from_tasks
from twotower_jax.reinforce.rewards import REWARDS, Answer, exact, rewards_of, words
from twotower_jax.reinforce.rollouts import Layout, Sampler, Steps, steps_of
from twotower_jax.two_tower import TwoTower

pytestmark = pytest.mark.usefixtures("compile_once")

BLOCK, NEW, TEMPERATURE = 4, 10, 0.7


@pytest.fixture(scope="module")
def model(small_config):
    return TwoTower(small_config("M*E-", vocab_size=40, eos_token_id=2), Variant())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config, random_params):
    """A two-tower checkpoint of two layers."""
    model = TwoTower(small_config("*-", vocab_size=512, eos_token_id=2))
    out, names = tmp_path_factory.mktemp("small") / "checkpoint", ("tokenizer.json", "tokenizer_config.json")
    small = {name: (DATA / "tiny" / "checkpoint" / name).read_bytes() for name in names}
    config = model.config.to_hf() | {"architectures": ["NemotronHTwoTowerForCausalLM"]}
    small["config.json"] = json.dumps(config).encode()
    write_folder(out, model_tensors(model, random_params(model)), small, 2**30)
    return out


@pytest.fixture(scope="module")
def sampled(model, random_params):
    """Parameters, answers to prompts of several lengths with all log-probabilities, and the layout of their rows."""
    params = random_params(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12], [13, 14, 15, 16, 17, 18], [5, 6, 7]]
    sampling = SamplingConfig(block_size=BLOCK, steps_per_block=3, strategy="posterior", temperature=TEMPERATURE)
    sampler = Sampler(model, sampling, longest=6, new=NEW, batch_size=5)
    return params, sampler(params, prompts, seed=3, logprobs=40), Layout.of(6, NEW, BLOCK, pad=0)


# What steps revealed.


def test_the_training_pass_gives_the_probabilities_that_the_engine_sampled_from(model, sampled):
    """Each token's log-probability under the tempered distribution without the mask token, of the step that revealed
    it: the ratio is 1 before any update."""
    params, results, layout = sampled
    steps = steps_of(results, layout)
    objective = Objective(model, BLOCK, TEMPERATURE, 0.2, 0.0)
    found = np.asarray(policy.score(params, {}, steps, objective=objective))
    compared = 0
    for row, number in enumerate(steps.answer):
        result, k = results[number], np.count_nonzero(steps.answer[:row] == number)
        for i, (token, of_step) in enumerate(zip(result.logprobs, result.step_map, strict=True)):
            place = layout.before + i
            assert steps.revealed[row, place] == (of_step == k + 1)
            if of_step != k + 1:
                continue
            of_all = np.array([logprob for _, logprob in token.top], np.float64) / TEMPERATURE
            expected = token.logprob / TEMPERATURE - np.logaddexp.reduce(of_all)
            assert steps.token[row, place] == token.token and len(token.top) == 40
            assert found[row, place] == pytest.approx(expected, abs=5e-6)
            compared += 1
    assert compared == sum(len(result.tokens) for result in results) > 20
    assert not found[~steps.revealed].any()


def test_rows_are_what_the_trace_says(sampled):
    _, results, layout = sampled
    steps = steps_of(results, layout)
    assert layout.length % BLOCK == layout.before % BLOCK == 0
    after = set()
    for number, result in enumerate(results):
        of = np.flatnonzero(steps.answer == number)
        offset = layout.before - len(result.prompt_ids)
        assert len(of) == max(step.step for step in result.trace) + 1
        for row in of:
            assert steps.clean[row, offset : layout.before].tolist() == result.prompt_ids
            assert steps.clean[row, layout.before :][: len(result.tokens)].tolist() == result.tokens
            assert set(steps.start[row, offset:]) == {offset} and not steps.start[row, :offset].any()
        # Each token of the answer counts once, and one after its end if a token of the answer is decided later.
        decided = {4 * step.block + i: (step.block, step.step) for step in result.trace for i in step.committed}
        last = max(decided[i] for i in range(len(result.tokens)))
        counted = {i for i in decided if i < len(result.tokens) or decided[i] < last}
        after |= {i in counted for i in decided if i >= len(result.tokens)}
        times = steps.revealed[of].sum(axis=0)
        assert times.max() == 1 and set(np.flatnonzero(times) - layout.before) == counted
        assert (steps.noisy[of][steps.revealed[of]] == 3).all()
        masked = (steps.noisy[of] == 3).reshape(len(of), -1, BLOCK).mean(axis=-1)
        assert np.array_equal(masked[:, layout.before // BLOCK :], steps.t[of][:, layout.before // BLOCK :])
    assert after == {True, False}


# The objective.


def random_batch(rows=5, length=6, seed=0) -> tuple[np.ndarray, Batch]:
    rng = np.random.default_rng(seed)
    log_p, old, start = (np.float32(-rng.uniform(0.1, 3, (rows, length))) for _ in range(3))
    blank = np.zeros((rows, length), np.int32)
    revealed = rng.random((rows, length)) < 0.6
    steps = Steps(blank, blank, np.zeros((rows, 1), np.float32), blank, revealed, blank, np.arange(rows))
    return log_p, Batch(steps, np.float32(rng.standard_normal(rows)), old, start)


def test_the_loss_is_the_literal_sum():
    log_p, batch = random_batch()
    loss = divergence = clipped = 0.0
    for r, i in np.argwhere(batch.steps.revealed):
        ratio, a = math.exp(float(log_p[r, i]) - float(batch.old[r, i])), float(batch.advantage[r])
        held = min(max(ratio, 0.8), 1.2)
        away = float(batch.start[r, i]) - float(log_p[r, i])
        divergence += math.exp(away) - away - 1
        loss += -min(ratio * a, held * a) + 0.3 * (math.exp(away) - away - 1)
        clipped += held * a < ratio * a
    found = policy.loss_sums(log_p, batch, 0.2, 0.3)
    np.testing.assert_allclose(found, (loss, divergence, clipped), rtol=2e-6)
    assert 0 < clipped < batch.steps.revealed.sum()


@pytest.mark.whole
def test_the_gradient_is_that_of_finite_differences(model, sampled):
    """Along random directions, of the mean over tokens that an update takes, added up over parts."""
    params, results, layout = sampled
    steps = steps_of(results[:2], layout)
    objective = Objective(model, BLOCK, TEMPERATURE, 0.2, 0.3)
    rng = np.random.default_rng(1)
    at = np.asarray(policy.score(params, {}, steps, objective=objective))
    # No ratio near a corner of the objective, which has no derivative there.
    old = at + np.float32(rng.choice([-0.4, -0.1, 0.1, 0.4], at.shape))
    batch = Batch(steps, np.float32(rng.standard_normal(2))[steps.answer], old, at + np.float32(0.3))
    trained, frozen = (
        {"denoiser_head": params["denoiser_head"]},
        {name: value for name, value in params.items() if name != "denoiser_head"},
    )
    tokens = np.float32(steps.revealed.sum())
    zeros = jax.tree.map(jnp.zeros_like, trained)
    nothing = policy.Sums(*(jnp.zeros(()) for _ in range(3)))
    gradients, sums = policy.add_gradients(trained, frozen, batch, tokens, zeros, nothing, objective=objective)

    def loss(trained):
        log_p = np.asarray(policy.score(trained, frozen, steps, objective=objective), np.float64)
        ratio, a = np.exp(log_p - old), batch.advantage[:, None]
        away = batch.start - log_p
        each = 0.3 * (np.exp(away) - away - 1) - np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        return each[steps.revealed].sum() / tokens

    assert float(sums.loss) / tokens == pytest.approx(loss(trained), rel=1e-5)
    step = 1e-2
    for _ in range(2):
        along = jax.tree.map(lambda v: np.float32(rng.standard_normal(v.shape)) / np.sqrt(v.size), trained)
        there, back = (loss(jax.tree.map(lambda v, d, s=s: v + s * d, trained, along)) for s in (step, -step))
        expected = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradients, along)), strict=True))
        assert (there - back) / (2 * step) == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_advantages_are_of_the_group():
    found = policy.advantages(np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [3.0, 1.0, 3.0, 1.0]]))
    deviation = math.sqrt(3) / 4 + 1e-4
    np.testing.assert_allclose(found[0], np.array([0.75, -0.25, -0.25, -0.25]) / deviation, rtol=1e-6)
    assert not found[1].any() and found.dtype == np.float32
    np.testing.assert_allclose(found[2], np.array([1, -1, 1, -1]) / 1.0001, rtol=1e-6)


# Questions and rewards.


def test_rewards():
    question = from_tasks(["add"], 1, 0)[0]
    assert tasks.split_of(question.prompt) == "train" and question.task == "add"
    right = Answer(question, question.answer, [])
    wrong = right._replace(text=right.text.replace(right.text.split()[-1], "x"))
    assert exact(right) == words(right) == 1.0 and exact(wrong) == 0.0 and 0 < words(wrong) < 1
    assert exact(right._replace(text=" ".join(right.text.split()))) == 1.0  # Read as the task reads it.
    own = Question("a", "b c")
    assert rewards_of("exact", [Answer(own, " b c ", []), Answer(own, "b  c", [])]) == [1.0, 0.0]
    assert rewards_of("words", [Answer(own, "b c d d", []), Answer(own, "", [])]) == [0.5, 0.0]
    REWARDS.register("odd", lambda answer: float("nan"))
    try:
        with pytest.raises(ValueError, match="reward 'odd' gave nan"):
            rewards_of("odd", [right])
    finally:
        REWARDS.unregister("odd")


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": "x"}) + "\n" for p in "abc"))
    asked = [question.prompt for question in from_file(path, 7, 1)]
    assert sorted(asked[:3]) == sorted(asked[3:6]) == ["a", "b", "c"] and asked == [
        q.prompt for q in from_file(path, 9, 1)[:7]
    ]
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match='row 1: expected "prompt" and "response"'):
        from_file(path, 1, 0)


@pytest.mark.parametrize(
    "changes", [{"group_size": 1}, {"clip": 0.0}, {"kl": -1.0}, {"reward": "none"}, {"updates": 0}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ReinforceConfig(checkpoint="x", asked="x", **changes)
    with pytest.raises(ValueError, match="temperature=0"):
        ReinforceConfig(checkpoint="x", asked="x", sampling=SamplingConfig())


# Runs.


@pytest.mark.whole
def test_the_reward_rises(folder, tmp_path):
    """Answers are worth the share of some tokens in them, one in eight. A run that is stopped and goes on gives the
    same numbers to the bit, though other questions are asked on the way."""
    REWARDS.register("eighths", lambda answer: sum(token % 8 == 5 for token in answer.tokens) / len(answer.tokens))
    sampling = SamplingConfig(block_size=BLOCK, steps_per_block=2, strategy="posterior", temperature=1.0)
    config = ReinforceConfig(
        checkpoint=str(folder),
        asked="a test",
        reward="eighths",
        steps=14,
        prompts_per_step=2,
        group_size=16,
        updates=2,
        max_new_tokens=2 * BLOCK,
        sampling=sampling,
        learning_rate=2e-2,
        kl=1e-3,
    )
    questions = [Question("The list", "x"), Question("A", "x")] * config.steps
    try:
        rows = reinforce(config, tmp_path / "run", questions, lambda line: None).rows
        parts = dataclasses.replace(config, steps=3), tmp_path / "parts", questions, lambda line: None
        stop = iter(["", "SIGTERM"]).__next__
        first = reinforce(*parts, held_out=questions[:2], stop=stop)
        then = reinforce(*parts, held_out=questions[:2])
        with pytest.raises(ValueError, match=r"holds another run .*: reinforce.kl 0.001 -> 0.1; use a new"):
            reinforce(dataclasses.replace(parts[0], kl=0.1), *parts[1:])
        assert reinforce(*parts) == (3, [])
    finally:
        REWARDS.unregister("eighths")
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    assert abs(rows[0]["kl"]) < 1e-6 < rows[1]["kl"]
    assert (first.step, then.step) == (1, 3)
    again = [row.copy() for row in (*first.rows, *then.rows)]
    asked = {row["step"]: [row.pop(f"validation_{name}", None) for name in ("reward", "exact")] for row in again}
    assert again[0] == {"step": 0} and asked.pop(1) == asked.pop(2) == [None, None]
    assert all(0 <= reward <= 1 and exact == 0 for reward, exact in asked.values())
    seconds = {"seconds": None}
    assert [row | seconds for row in again[1:]] == [row | seconds for row in rows[:3]]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == rows
    # What is saved is what trained: the denoiser has changed, and the context, which is frozen, has not.
    before, after = (load(path).params for path in (folder, tmp_path / "run"))
    same = {name: all(map(np.array_equal, *map(jax.tree.leaves, (before[name], after[name])))) for name in before}
    assert same["context_tower"] and same["context_head"]
    assert not same["denoiser_tower"] and not same["denoiser_head"]


@pytest.mark.whole
def test_the_command(folder, tmp_path):
    questions, own = tmp_path / "questions.jsonl", tmp_path / "own.py"
    questions.write_text('{"prompt": "The list", "response": "object"}\n')
    own.write_text(
        "from twotower_jax.reinforce.rewards import REWARDS\n"
        "REWARDS.register('short', lambda answer: -len(answer.tokens))\n"
    )
    words = (
        *(f"--checkpoint={folder}", f"--workdir={tmp_path / 'run'}", f"--questions={questions}"),
        *(f"--register={own}", "--reward=short", "--steps=1", "--prompts_per_step=1", "--group_size=2"),
        *("--max_new_tokens=4", "--block_size=4", "--steps_per_block=2", "--strategy=posterior"),
    )
    done = run_command("reinforce", *words)
    assert done.returncode == 0, done.stderr
    assert "step 1/1  reward -" in done.stdout
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["reinforce"]["reward"] == "short" and "own.py sha256" in str(settings["registered"])
    for wrong, said in (
        ((*words, "--seed=1"), "holds another run (saved -> now): seed 0 -> 1; use a new workdir"),
        ((*words[:2], "--tasks=sums"), "there is no task 'sums'"),
        (words[:2], "give either --tasks"),
        ((*words[:3], "--temperature=0"), "temperature=0"),
        ((*words[:3], "--reward=none"), "reward='none' is unknown"),
    ):
        done = run_command("reinforce", *wrong)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
