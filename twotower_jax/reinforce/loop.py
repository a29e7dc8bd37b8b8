"""The run: answers to some prompts in groups, what they are worth, one update or a few, and so on; in one process.

Generation and training share the weights: what an update makes, the next answers are sampled from.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from twotower_jax.checkpoint.fingerprint import fingerprint
from twotower_jax.checkpoint.load import Loaded, load_merged, stored_method
from twotower_jax.checkpoint.workdir import Saver, Workdir, read_base
from twotower_jax.data import Decoder, encode, load_tokenizer
from twotower_jax.data.tokenizer import save_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation.settings import Result
from twotower_jax.parameters import Params, count
from twotower_jax.paths import as_path
from twotower_jax.registry import registered
from twotower_jax.reinforce import policy
from twotower_jax.reinforce.policy import Batch, Objective, Sums
from twotower_jax.reinforce.questions import Question
from twotower_jax.reinforce.rewards import REWARDS, Answer, rewards_of
from twotower_jax.reinforce.rollouts import Layout, Sampler, Steps, steps_of
from twotower_jax.tokens import check_ids
from twotower_jax.train.config import ADDED, TrainConfig
from twotower_jax.train.metrics import METRICS, open_lines, writing
from twotower_jax.train.objectives import Denoiser
from twotower_jax.train.step import TrainState, abstract_state, make_optimizer, merge, start_state, tables

Row = dict[str, Any]
Report = Callable[[str], None]

# Settings in which a run that goes on may differ from before.
CHANGEABLE = ("steps", "checkpoint_every", "validation_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """The settings of a run.

    Attributes:
      checkpoint: of any kind but quantized; the tokenizer and the variant are its own.
      asked: where the questions come from, for the record.
      reward: a name of `REWARDS`.
      steps: of sampling. prompts_per_step, group_size: different prompts of each, and answers to each of them.
      updates: of the weights from the answers of a step.
      max_new_tokens: of an answer. sampling: how it is sampled; without filters.
      learning_rate: of AdamW, the same in all steps.
      clip, kl: ε and β, see `policy.loss_sums`.
      rows: of the training pass that are computed together.
      checkpoint_every: steps; 0 saves at the end only.
      validation_every: steps between two answers to all questions that are held out; 0 asks them before the first step
        and after the last.

    Raises:
      ValueError: at construction, naming the value.
    """

    checkpoint: str
    asked: str
    reward: str = "exact"
    steps: int = 100
    prompts_per_step: int = 8
    group_size: int = 8
    updates: int = 1
    max_new_tokens: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(temperature=1.0))
    learning_rate: float = 1e-5
    clip: float = 0.2
    kl: float = 0.01
    seed: int = 0
    rows: int = 16
    checkpoint_every: int = 0
    validation_every: int = 0

    def __post_init__(self):
        REWARDS[self.reward]
        for name in ("steps", "prompts_per_step", "updates", "max_new_tokens", "rows"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 and less than 2**31")
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2: answers are compared in their group")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip} must be more than 0 and less than 1")
        if not self.kl >= 0:
            raise ValueError(f"kl={self.kl} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and less than 2**32")
        for name in ("checkpoint_every", "validation_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.sampling.temperature <= 0:
            raise ValueError("temperature=0 samples the same answer again and again; give a number of more than 0")
        if self.sampling.top_k or self.sampling.top_p < 1:
            raise ValueError("top_k and top_p leave tokens out of the policy that is trained; leave them out")

    @property
    def answers(self) -> int:
        """How many answers a step has."""
        return self.prompts_per_step * self.group_size


class Learner:
    """The weights and their updates.

    Args:
      model, params: as loaded. layout: of the rows of the training pass.

    Attributes:
      state, frozen: what trains and what does not. model: of the policy, which generation takes as well.
    """

    def __init__(self, config: ReinforceConfig, settings: TrainConfig, loaded: Loaded, layout: Layout):
        self.model, self._denoiser = loaded.model, Denoiser(loaded.model)
        self._updates, self._rows = config.updates, config.rows
        self._optimizer = make_optimizer(settings, tables(self._denoiser)[0])
        temperature = config.sampling.temperature
        self._objective = Objective(self.model, layout.block_size, temperature, config.clip, config.kl)
        self.state: TrainState
        self.state, self.frozen = start_state(self._denoiser, self._optimizer, loaded.params)
        # Updates consume the state, and the divergence is from what it was.
        self._start = jax.tree.map(jnp.copy, self.state.params) if config.kl else None

    @property
    def params(self) -> Params:
        """All parameters as they are now."""
        return merge(self.state.weights, self.frozen)

    def restore(self, folder: Workdir) -> None:
        """Takes weights and moments of the newest checkpoint; what divergence is from stays what was loaded.

        Raises:
          CheckpointError: if the checkpoint is broken.
        """
        state, frozen = abstract_state(self._denoiser, self._optimizer)
        weights, optimizer, self.frozen, _ = folder.restore(state.weights, state.optimizer, frozen)
        made = jnp.int32(folder.step * self._updates)
        self.state = state.with_weights(weights).replace(step=made, optimizer=optimizer)

    def learn(self, steps: Steps, advantages: np.ndarray) -> Row:
        """Makes the updates of one sampling.

        Args:
          steps: all of some answers. advantages: (answers,) float32.

        Returns:
          `kl`, a token, of the policy that sampled from that at the start of the run, None where it costs nothing; and
          of the last update `loss`, `clipped_share` of the tokens, and `grad_norm`.

        Raises:
          FloatingPointError: if the loss or the gradient is not finite; the weights are as they were before.
        """
        tokens = float(steps.revealed.sum())
        batches = [self._batch(part, advantages) for part in self._parts(steps)]
        divergence = None
        for _ in range(self._updates):
            gradients = jax.tree.map(jnp.zeros_like, self.state.params)
            sums = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
            for batch in batches:
                gradients, sums = policy.add_gradients(
                    *(self.state.params, self.frozen, batch, tokens, gradients, sums), objective=self._objective
                )
            self.state, norm = policy.update(self.state, gradients, optimizer=self._optimizer)
            loss, kl, clipped, norm = (float(value) for value in (*sums, norm))
            if not np.isfinite([loss, norm]).all():
                raise FloatingPointError("the loss or its gradient is not finite; a lower learning_rate may help")
            if divergence is None and self._start is not None:
                divergence = kl / tokens
        return {"kl": divergence, "loss": loss / tokens, "clipped_share": clipped / tokens, "grad_norm": norm}

    def _parts(self, steps: Steps) -> Iterator[Steps]:
        """Rows that are computed together; the last ones are filled up with rows that reveal nothing."""
        for first in range(0, len(steps.answer), self._rows):
            part = Steps(*(field[first : first + self._rows] for field in steps))
            missing = self._rows - len(part.answer)
            yield Steps(*(np.pad(field, [(0, missing)] + [(0, 0)] * (field.ndim - 1)) for field in part))

    def _batch(self, steps: Steps, advantages: np.ndarray) -> Batch:
        old = policy.score(self.state.params, self.frozen, steps, objective=self._objective)
        start = old if self._start is None else policy.score(self._start, self.frozen, steps, objective=self._objective)
        return Batch(steps, advantages[steps.answer], old, start)


class ReinforceResult(NamedTuple):
    """How a run ended.

    Attributes:
      step: steps made in all.
      rows: of metrics.jsonl that this call has added.
    """

    step: int
    rows: list[Row]


def reinforce(
    config: ReinforceConfig,
    workdir: str | pathlib.Path,
    questions: Sequence[Question],
    report: Report = print,
    *,
    held_out: Sequence[Question] = (),
    stop: Callable[[], str] = lambda: "",
) -> ReinforceResult:
    """Runs all steps, or goes on from the newest checkpoint in `workdir`: answers, losses and weights are then those of
    a run that was not interrupted, to the bit.

    The workdir is one as those of `launch/train.py` are, which everything that takes a checkpoint takes; its
    metrics.jsonl has a row for each step.

    Args:
      workdir: new, empty, or of this same run.
      questions: `steps · prompts_per_step`, in the order in which they are asked.
      held_out: questions that teach nothing, asked as `validation_every` says, at temperature 0. A new run has them in
        a row of step 0.
      stop: is asked after every step; anything but "" saves and ends the run.

    Raises:
      ValueError, OSError: for inputs that cannot be used, before anything is written; CheckpointError for a checkpoint
        that is broken; FloatingPointError for weights that are not finite any more; SaveError for what cannot be
        written.
    """
    setup = _Setup.make(config, workdir, questions, held_out)
    learner = setup.learner
    report(
        f"{config.asked}: {count(tables(Denoiser(learner.model))[0]):,} parameters train on {config.steps} × "
        f"{config.prompts_per_step} prompts with {config.group_size} answers each"
    )
    rows = []
    with setup.folder().locked():
        folder = setup.folder()  # As it is now that no other run writes to it.
        if folder.step is None:
            setup.begin(folder)
        else:
            learner.restore(folder)
            folder.write_settings(learner.model.config)
            report(f"resuming at step {folder.step} of {config.steps}")
        made = saved = folder.step or 0
        with folder.logging(METRICS), folder.saver(keep=2) as saver, open_lines(folder.logs / METRICS) as file:

            def write(row: Row) -> None:
                rows.append(row)
                with writing(folder.path / METRICS):
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
                report(_line(row, config.steps))

            if folder.step is None and held_out:
                write({"step": 0} | _validate(config, setup))
            while made < config.steps and not stop():
                started, made = time.monotonic(), made + 1
                last = made == config.steps
                try:
                    row = {"step": made} | _step(config, setup, made)
                except FloatingPointError as error:
                    raise FloatingPointError(f"step {made}: {error}") from None
                row["seconds"] = round(time.monotonic() - started, 3)
                if held_out and (last or _due(made, config.validation_every)):
                    row |= _validate(config, setup)
                write(row)
                if last or _due(made, config.checkpoint_every):
                    _save(saver, made, learner)
                    saved = made
            if made > saved:
                _save(saver, made, learner)
    return ReinforceResult(made, rows)


class _Asked(NamedTuple):
    """Questions, their prompts as token ids, and what answers them."""

    questions: Sequence[Question]
    prompts: Sequence[np.ndarray]
    sampler: Sampler


class _Setup(NamedTuple):
    """What a run reads before it writes anything."""

    folder: Callable[[], Workdir]
    tokenizer: Tokenizer
    tokenizer_folder: pathlib.Path
    training: _Asked
    held_out: _Asked
    layout: Layout
    learner: Learner

    @classmethod
    def make(
        cls,
        config: ReinforceConfig,
        workdir: str | pathlib.Path,
        questions: Sequence[Question],
        held_out: Sequence[Question],
    ) -> "_Setup":
        if (method := stored_method(config.checkpoint)) is not None:
            raise ValueError(
                f"{config.checkpoint}: its weights are quantized ({method.name}), from which training cannot start; "
                "give the checkpoint that it was made from"
            )
        size = config.sampling.block_size
        loaded = load_merged(config.checkpoint)
        tokenizer = load_tokenizer(loaded.tokenizer_folder)
        prompts = encode(tokenizer, [question.prompt for question in (*questions, *held_out)])
        check_ids(np.concatenate(prompts), loaded.model.config.vocab_size, "questions")
        longest = max(map(len, prompts))
        layout = Layout.of(longest, config.max_new_tokens, size, loaded.model.config.pad_token_id)
        settings = TrainConfig(
            model={},
            objective="denoiser",
            variant=loaded.model.variant,
            init_from=str(config.checkpoint),
            block_size=size,
            sequence_length=layout.length,
            batch_size=config.answers,
            steps=config.steps,
            learning_rate=config.learning_rate,
            final_learning_rate=config.learning_rate,
            warmup_fraction=0.0,
            decay_fraction=0.0,
            weight_decay=0.0,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            validation_every=config.validation_every,
        )
        learner = Learner(config, settings, loaded, layout)
        said = dataclasses.asdict(settings)
        # What the settings do not say already, and what tells this checkpoint from another one at its place.
        said["reinforce"] = {name: value for name, value in dataclasses.asdict(config).items() if name not in said}
        start = as_path(config.checkpoint)
        said["reinforce"]["towers"] = None if read_base(start) else fingerprint(start)
        if own := registered():
            said["registered"] = own
        folder = functools.partial(Workdir, workdir, said, CHANGEABLE, ADDED)
        folder()  # Refuses a workdir that cannot be this run's.
        room = {"longest": longest, "new": config.max_new_tokens, "batch_size": config.answers}
        training = Sampler(loaded.model, config.sampling, **room)
        greedy = Sampler(loaded.model, dataclasses.replace(config.sampling, temperature=0.0), **room)
        return cls(
            folder,
            tokenizer,
            loaded.tokenizer_folder,
            _Asked(questions, prompts[: len(questions)], training),
            _Asked(held_out, prompts[len(questions) :], greedy),
            layout,
            learner,
        )

    def begin(self, folder: Workdir) -> None:
        """Writes what a new workdir holds once."""
        config = self.learner.model.config
        folder.create(config, self.learner.frozen)
        with writing(folder.path):
            roles = {"end_token": config.eos_token_ids[0], "source": self.tokenizer_folder}
            save_tokenizer(self.tokenizer, folder.path, **roles)

    def answers(self, asked: _Asked, numbers: Iterable[int], seed: int) -> tuple[list[Answer], list[Result]]:
        """What the policy answers now to some of the questions, by their numbers."""
        results = asked.sampler(self.learner.params, [asked.prompts[n] for n in numbers], seed)
        decode = Decoder(self.tokenizer)
        pairs = zip(numbers, results, strict=True)
        return [Answer(asked.questions[n], decode(r.tokens), r.tokens) for n, r in pairs], results


def _step(config: ReinforceConfig, setup: _Setup, step: int) -> Row:
    """Samples, rewards and learns."""
    first = (step - 1) * config.prompts_per_step
    numbers = [first + n for n in range(config.prompts_per_step) for _ in range(config.group_size)]
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    answers, results = setup.answers(setup.training, numbers, seed)
    rewards = np.array(rewards_of(config.reward, answers)).reshape(-1, config.group_size)
    advantages = policy.advantages(rewards).reshape(-1)
    learned = setup.learner.learn(steps_of(results, setup.layout), advantages)
    tokens = sum(len(result.tokens) for result in results)
    return {
        "reward": float(rewards.mean()),
        "exact": float(np.mean(rewards_of("exact", answers))),
        "alike_groups": float(np.mean(rewards.std(axis=1) == 0)),
        "tokens_per_answer": tokens / len(results),
        "tokens_per_evaluation": tokens / sum(result.denoiser_evaluations for result in results),
        **learned,
    }


def _validate(config: ReinforceConfig, setup: _Setup) -> Row:
    """What the questions that are held out tell of the weights as they are now."""
    answers, _ = setup.answers(setup.held_out, range(len(setup.held_out.questions)), config.seed)
    return {
        "validation_reward": float(np.mean(rewards_of(config.reward, answers))),
        "validation_exact": float(np.mean(rewards_of("exact", answers))),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(saver: Saver, step: int, learner: Learner) -> None:
    saver.save(step, learner.state.weights, learner.state.optimizer, {})
    saver.wait()


def _line(row: Row, steps: int) -> str:
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if "reward" in row:
        parts += [
            f"reward {row['reward']:.3f}",
            f"exact {row['exact']:.3f}",
            *([] if row["kl"] is None else [f"kl {row['kl']:.4f}"]),
            f"grad norm {row['grad_norm']:.3f}",
            f"{row['tokens_per_evaluation']:.2f} tokens/evaluation",
            f"{row['seconds']:.1f} s",
        ]
    if "validation_reward" in row:
        parts.append(f"held out: reward {row['validation_reward']:.3f}, exact {row['validation_exact']:.3f}")
    return "  ".join(parts)
