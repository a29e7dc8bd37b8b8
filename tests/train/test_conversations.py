"""Training on conversations: what an answer may know of, what counts, and runs of both objectives."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ROOT, run_command
from twotower_jax.config import Variant
from twotower_jax.data import TrainingData
from twotower_jax.data.conversation_windows import ConversationWindows
from twotower_jax.data.conversations import ConversationList, Turns
from twotower_jax.diffusion import MaskedDiffusion
from twotower_jax.diffusion.weights import Elbo
from twotower_jax.parameters import bind
from twotower_jax.train.config import check_given
from twotower_jax.train.loop import train
from twotower_jax.train.objectives import Autoregressive, Denoiser, Documents, NoiseKey
from twotower_jax.train.placement import Placement, choose_mesh
from twotower_jax.train.step import make_optimizer, make_step, start_state, tables
from twotower_jax.two_tower import Backbone, TwoTower

pytestmark = pytest.mark.usefixtures("compile_once")

BLOCK, LENGTH, END, MASK = 4, 48, 2, 3
PARTS = ([(3, 5), (2, 4)], [(6, 2), (1, 1), (3, 2)])
WEIGHT = 0.25


def make_windows(parts=PARTS, align=BLOCK, length=LENGTH, vocab_size=100):
    rng = np.random.default_rng(0)
    talks = [Turns(rng.integers(4, vocab_size, np.sum(p)).astype(np.int32), np.array(p, np.int64)) for p in parts]
    options = {"name": "talks", "align": align, "padding_weight": WEIGHT, "end_token": END}
    return ConversationWindows(ConversationList(talks), length, vocab_size, **options)


def documents_of(window) -> Documents:
    return Documents(*(window[name][None] for name in ("document_start", "counted", "token_weight", "turn")))


# What an answer knows of.


@functools.cache
def derivatives(model):
    """How large the derivatives of the losses of some of the masked positions, given as (5, L), are in the embedding
    of each position's token, clean and noisy, (5, L). Every position has its own token; masked ones share theirs."""
    clean = 4 + np.arange(LENGTH, dtype=np.int32)[None]

    def losses(embeddings, params, noisy, starts, of):
        bound = bind(model, {**params, **{n: {**params[n], "embeddings": e} for n, e in embeddings.items()}})
        states = bound.training_states(clean, noisy[None], jnp.full(1, 0.5), BLOCK, starts[None])
        log_p = bound.denoiser_head.log_probabilities(states.denoiser, clean)
        return -jnp.sum(jnp.where(of & (noisy == MASK), log_p, 0.0), axis=1)

    @jax.jit
    def sizes(params, *told):
        embeddings = {name: params[name]["embeddings"] for name in ("context_tower", "denoiser_tower")}
        found = jax.jacrev(losses)(embeddings, params, *told)
        return sum(jnp.sum(jnp.abs(v), axis=-1) for v in found.values())[:, 4:]

    return sizes


def known(model, params, window):
    """The `derivatives` of each answer's loss, by the start of its conversation and its turn."""
    ends = sorted({(int(s), int(t)) for s, t in zip(window["document_start"], window["turn"], strict=True) if t})
    of = [(window["document_start"] == start) & (window["turn"] == turn) for start, turn in ends]
    of += [np.zeros(LENGTH, bool)] * (5 - len(of))
    noisy = np.where(window["counted"] & (np.arange(LENGTH) % 3 > 0), MASK, 4 + np.arange(LENGTH, dtype=np.int32))
    found = derivatives(model)(params, noisy, window["document_start"], np.stack(of))
    return dict(zip(ends, np.asarray(found), strict=False))


@pytest.fixture(scope="module", params=[False, True], ids=["forward", "bidirectional"])
def open_model(request, small_config, random_params):
    """One whose context passes derivatives on, and its parameters."""
    variant = Variant(context="trained", bidirectional_mamba=request.param)
    model = TwoTower(small_config("M*", vocab_size=4 + LENGTH), variant)
    return model, random_params(model)


@pytest.mark.whole(but=["forward"])
def test_no_answer_knows_of_anything_later(open_model):
    """No derivative of its loss in any token after its blocks, nor in any of another conversation; and one in what was
    said before it."""
    window = make_windows()[0]
    found = known(*open_model, window)
    assert len(found) == 5
    for (start, turn), sizes in found.items():
        first, last = np.flatnonzero((window["document_start"] == start) & (window["turn"] == turn))[[0, -1]]
        assert not sizes[last + 1 :].any() and (sizes[start:first] > 0).all()
        # Decays of what is forgotten cancel but for their rounding.
        assert (sizes[:start] < 1e-6 * sizes.max()).all()


@pytest.mark.whole(but=["forward"])
def test_answers_off_the_borders_would_know_what_is_said_next(open_model):
    window = make_windows([[(3, 3), (4, 4)]], align=1)[0]
    first = known(*open_model, window)[0, 1]
    assert first[np.flatnonzero(window["turn"] == 1)[-1] + 1 :].any()


# What counts.


@pytest.fixture(scope="module")
def denoiser(small_config):
    return Denoiser(TwoTower(small_config("-", vocab_size=100), Variant(context="trained", context_loss=True)))


def literal(window, log_p, masked, weight):
    """Sums of losses and of what they are over: of all, of each turn."""
    total = count = 0.0
    by_turn = np.zeros((2, 8))
    for position in np.flatnonzero(masked):
        worth, turn = float(window["token_weight"][position]), int(window["turn"][position])
        total -= worth * weight * float(log_p[position])
        count += worth
        by_turn[:, turn - 1] += worth * -float(log_p[position]), worth
    return total, count, by_turn


@pytest.mark.whole(but=["[]"])
@pytest.mark.parametrize("complementary", [False, True], ids=["", "complementary"])
def test_losses_equal_literal_sums(denoiser, random_params, complementary):
    """Only what the assistant says is masked, and tokens count their weight; so do the context's next tokens."""
    objective = dataclasses.replace(denoiser, diffusion=MaskedDiffusion(complementary=complementary))
    window, params = make_windows()[0], random_params(denoiser.model)
    ids, documents, noise = window["ids"][None], documents_of(window), NoiseKey(0, 1, jnp.arange(1))
    examples = objective.examples(ids, jnp.ones(1, bool), noise, BLOCK, documents)
    masked = np.asarray(examples.masked)
    assert (np.asarray(examples.noisy) == np.where(masked, MASK, ids)).all()
    assert masked.any() and not masked[:, ~window["counted"]].any()
    if complementary:
        assert np.array_equal(masked.sum(axis=0), window["counted"])
    # The noise is that of the same tokens without conversations.
    plain = objective.examples(ids, jnp.ones(1, bool), noise, BLOCK)
    assert np.array_equal(masked, np.asarray(plain.masked) & window["counted"])

    @jax.jit
    def compute(params):
        bound = bind(objective.model, params)
        states = bound.training_states(examples.clean, examples.noisy, examples.t, BLOCK, examples.start)
        log_p = bound.denoiser_head.log_probabilities(states.denoiser, examples.clean)
        next_log_p = bound.context_head.log_probabilities(states.context, jnp.roll(examples.clean, -1, axis=1))
        return objective.losses_of(params, examples, BLOCK, validating=True), log_p, next_log_p

    losses, log_p, next_log_p = jax.device_get(compute(params))
    rows = [literal(window, p, m, 1.0) for p, m in zip(log_p, masked, strict=True)]
    total, count, by_turn = (sum(parts) for parts in zip(*rows, strict=True))
    np.testing.assert_allclose([losses["masked_loss"].total, losses["masked_loss"].count], [total, count], rtol=1e-5)
    np.testing.assert_allclose(np.stack(losses["by_turn"]), by_turn, rtol=1e-5)
    assert (by_turn[1] > 0).sum() == 3 or not complementary
    for name in ("by_noise_level", "by_block_position", "masked_loss_by_row"):
        np.testing.assert_allclose([np.sum(part) for part in losses[name]], [total, count], rtol=1e-5)

    wanted = [literal(window, np.roll(p, 1), window["counted"], 1.0) for p in next_log_p]
    expected = [sum(parts) for parts in zip(*(w[:2] for w in wanted), strict=True)]
    np.testing.assert_allclose(list(losses["context_loss"]), expected, rtol=1e-5)
    counts = objective.counts(examples)
    assert all(counts[term] == losses[term].count for term in objective.terms)


@pytest.mark.whole
def test_a_weight_over_all_tokens_divides_by_what_they_count(denoiser, random_params):
    objective = dataclasses.replace(denoiser, diffusion=MaskedDiffusion(weight=Elbo()))
    window = make_windows()[0]
    noise = NoiseKey(0, 1, jnp.arange(1))
    losses = objective.losses(
        random_params(denoiser.model), window["ids"][None], jnp.ones(1, bool), noise, BLOCK, documents_of(window)
    )
    np.testing.assert_allclose(losses["masked_loss"].count, window["token_weight"].sum(), rtol=1e-6)


def test_a_backbone_learns_answers_alone(small_config, random_params):
    model = Backbone(small_config("-", vocab_size=100))
    objective, params, window = Autoregressive(model), random_params(model), make_windows(align=1)[0]
    arguments = window["ids"][None], jnp.ones(1, bool), NoiseKey(0, 0, jnp.arange(1)), BLOCK, documents_of(window)
    losses = jax.jit(lambda p: objective.losses(p, *arguments))(params)
    log_p = np.asarray(jax.nn.log_softmax(bind(model, params).logits(window["ids"][None])))[0]
    said = [log_p[i - 1, window["ids"][i]] if i else 0.0 for i in range(LENGTH)]
    total, count, by_turn = literal(window, said, window["counted"], 1.0)
    np.testing.assert_allclose(list(losses["next_token_loss"]), [total, count], rtol=1e-5)
    np.testing.assert_allclose(np.stack(losses["by_turn"]), by_turn, rtol=1e-5)
    assert count == window["counted"].sum() == 14


# Steps and runs.


@pytest.mark.whole
def test_a_step_is_the_same_in_parts_and_on_a_mesh(step_config, random_params):
    """On a mesh that divides rows and positions, and with rows taken in two parts."""
    parts = [[(3 + i % 3, 5), (2, 1 + i)] for i in range(16)]

    def run(**changes):
        config = step_config(**{"model.hybrid_override_pattern": "*", "reset_at_documents": True, **changes})
        objective = Denoiser(TwoTower(config.model_config(40)))
        optimizer = make_optimizer(config, tables(objective)[0])
        mesh = choose_mesh(config.mesh)
        data = TrainingData(make_windows(parts, length=32, vocab_size=40), batch_size=8, seed=0)
        placement = Placement(mesh, 8)
        batch = placement.batch(next(data))
        assert batch.documents.token_weight is not None
        step = jax.jit(make_step(config, objective, optimizer, 4))
        state, frozen = start_state(objective, optimizer, random_params(objective.model), mesh)
        with placement.in_force():
            return step(state, frozen, *batch[1:])[1]

    one, other = run(), run(**{"accumulate": 2, "mesh.data": 2, "mesh.sequence": 2})
    assert 0 < float(one.losses["masked_loss"].count) < 8 * 32
    np.testing.assert_allclose(other.loss, one.loss, rtol=2e-6)
    np.testing.assert_allclose(other.grad_norm, one.grad_norm, rtol=3e-6)
    np.testing.assert_allclose(other.losses["by_turn"].total, one.losses["by_turn"].total, rtol=1e-5)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"prompt": f"say {'abcdef'[i % 6] * (1 + i % 3)}", "response": "abcdef"[i % 6] * 3} for i in range(80)]
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row.pop("step"): {k: v for k, v in row.items() if k != "tokens_per_second"} for row in lines}


@pytest.mark.whole
def test_a_run_goes_on_to_the_bit(train_config, talks, tmp_path):
    """Stopped and started again; validated by turn, and by answers to what is held out."""
    config = train_config(
        **{"pattern": "-", "objective": "denoiser", "data": talks, "steps": 8, "log_every": 2, "checkpoint_every": 4},
        **{"sample_answers": 3, "sample_tokens": 8},
    )
    said = []
    train(config, tmp_path / "whole", said.append)
    assert any("the tokenizer has no chat template" in line for line in said)
    assert any("72 conversations, 72 answers" in line for line in said)
    train(config, tmp_path / "parts", said.append, stop=iter([""] * 5 + ["SIGTERM"] * 9).__next__)
    result = train(config, tmp_path / "parts", said.append)
    whole = rows_of(tmp_path / "whole")
    assert result.step == 8 and rows_of(tmp_path / "parts") == whole
    by_turn = whole[8]["validation_loss_by_turn"]
    assert by_turn[0] > 0 and by_turn[1:] == [None] * 7
    assert 0 < whole[8]["validation_tokens_per_evaluation"] <= 8 and 0 <= whole[8]["validation_exact_answers"] <= 1
    assert whole[8]["loss"] < whole[2]["loss"]


def test_a_backbone_on_conversations(train_config, talks, tmp_path):
    config = train_config(pattern="-", data=talks, steps=4)
    row = train(config, tmp_path, lambda line: None).metrics
    np.testing.assert_allclose(row["validation_loss_by_turn"][0], row["validation_loss"], rtol=1e-6)


def test_settings(train_config):
    with pytest.raises(ValueError, match=r"padding_weight=0.0 must be more than 0 and at most 1"):
        train_config(padding_weight=0.0)
    with pytest.raises(ValueError, match="sample_answers=2 needs objective='denoiser'"):
        train_config(sample_answers=2)
    with pytest.raises(ValueError, match="padding_weight=0.5 changes nothing with objective='autoregressive'"):
        check_given(train_config(padding_weight=0.5), ["padding_weight"])


def test_answers_need_held_out_conversations(train_config, talks, tmp_path):
    for changes in ({}, {"data": talks, "validation_fraction": 0.0}):
        config = train_config(pattern="-", objective="denoiser", sample_answers=2, **changes)
        with pytest.raises(ValueError, match="sample_answers=2 needs conversations that are held out"):
            train(config, tmp_path / "run", lambda line: None)
        assert not (tmp_path / "run").exists()


def test_bad_conversations_end_the_command_before_anything_is_written(talks, tmp_path):
    bad = tmp_path / "bad.jsonl"
    with open(talks, encoding="utf-8") as good:
        bad.write_text(good.read() + '{"messages": [{"role": "user", "content": "a"}]}\n')
    flags = f"--config={ROOT / 'configs' / 'tiny.py'}", f"--config.data={bad}", f"--workdir={tmp_path / 'run'}"
    done = run_command("train", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert 'bad.jsonl, line 81: no message has the role "assistant"' in done.stderr
    assert not (tmp_path / "run").exists()
