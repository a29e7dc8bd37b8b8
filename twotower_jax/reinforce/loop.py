"""The run: answers to some prompts in groups, what they are worth, one update or a few, and so on; in one process.

Generation and training share the weights: what an update makes, the next answers are sampled from.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from twotower_jax.checkpoint.load import Loaded, load_merged, stored_method
from twotower_jax.checkpoint.workdir import CONFIG, Saver, Workdir
from twotower_jax.data import Decoder, encode, load_tokenizer
from twotower_jax.data.tokenizer import save_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.parameters import Params, count
from twotower_jax.paths import as_path
from twotower_jax.registry import registered
from twotower_jax.reinforce import policy
from twotower_jax.reinforce.policy import Batch, Objective, Sums
from twotower_jax.reinforce.questions import Question
from twotower_jax.reinforce.rewards import REWARDS, Answer, rewards_of
from twotower_jax.reinforce.rollouts import Layout, Sampler, Steps, steps_of
from twotower_jax.tokens import check_ids
from twotower_jax.train.config import ADDED, CHANGEABLE, TrainConfig
from twotower_jax.train.metrics import METRICS, open_lines, writing
from twotower_jax.train.objectives import Denoiser
from twotower_jax.train.step import TrainState, make_optimizer, merge, start_state, tables

Row = dict[str, Any]
Report = Callable[[str], None]


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
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must not be negative")
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
        denoiser = Denoiser(loaded.model)
        self.model = loaded.model
        self._updates, self._rows = config.updates, config.rows
        self._optimizer = make_optimizer(settings, tables(denoiser)[0])
        temperature = config.sampling.temperature
        self._objective = Objective(self.model, layout.block_size, temperature, config.clip, config.kl)
        self.state: TrainState
        self.state, self.frozen = start_state(denoiser, self._optimizer, loaded.params)
        # Updates consume the state, and the divergence is from what it was.
        self._start = jax.tree.map(jnp.copy, self.state.params) if config.kl else None

    @property
    def params(self) -> Params:
        """All parameters as they are now."""
        return merge(self.state.weights, self.frozen)

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


def reinforce(
    config: ReinforceConfig, workdir: str | pathlib.Path, questions: Sequence[Question], report: Report = print
) -> list[Row]:
    """Runs all steps and saves a workdir as those of `launch/train.py` are, which everything that takes a checkpoint
    takes; its metrics.jsonl has a row for each step.

    Args:
      workdir: new or empty.
      questions: `steps · prompts_per_step`, in the order in which they are asked.

    Returns:
      the rows.

    Raises:
      ValueError, OSError: for inputs that cannot be used, before anything is written; FloatingPointError for weights
        that are not finite any more; SaveError for what cannot be written.
    """
    setup = _Setup.make(config, workdir, questions)
    learner, folder = setup.learner, setup.folder
    report(
        f"{config.asked}: {count(tables(Denoiser(learner.model))[0]):,} parameters train on {config.steps} × "
        f"{config.prompts_per_step} prompts with {config.group_size} answers each"
    )
    rows = []
    with folder.locked():
        folder.create(learner.model.config, learner.frozen)
        with writing(folder.path):
            roles = {"end_token": learner.model.config.eos_token_ids[0], "source": setup.tokenizer_folder}
            save_tokenizer(setup.tokenizer, folder.path, **roles)
        with folder.logging(), folder.saver(keep=2) as saver, open_lines(folder.logs / METRICS) as file:
            for step in range(1, config.steps + 1):
                started = time.monotonic()
                try:
                    row = {"step": step} | _step(config, setup, step)
                except FloatingPointError as error:
                    raise FloatingPointError(f"step {step}: {error}") from None
                row["seconds"] = round(time.monotonic() - started, 3)
                rows.append(row)
                with writing(folder.path / METRICS):
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
                report(_line(row, config.steps))
                if step == config.steps or config.checkpoint_every and step % config.checkpoint_every == 0:
                    _save(saver, step, learner)
    return rows


class _Setup(NamedTuple):
    """What a run reads before it writes anything."""

    folder: Workdir
    tokenizer: Tokenizer
    tokenizer_folder: pathlib.Path
    questions: Sequence[Question]
    prompts: list[np.ndarray]
    sampler: Sampler
    layout: Layout
    learner: Learner

    @classmethod
    def make(cls, config: ReinforceConfig, workdir: str | pathlib.Path, questions: Sequence[Question]) -> "_Setup":
        if (method := stored_method(config.checkpoint)) is not None:
            raise ValueError(
                f"{config.checkpoint}: its weights are quantized ({method.name}), from which training cannot start; "
                "give the checkpoint that it was made from"
            )
        path = as_path(workdir)
        if (path / CONFIG).exists():
            raise ValueError(f"workdir {path} holds a run; choose another one, and go on with it as checkpoint")
        size = config.sampling.block_size
        loaded = load_merged(config.checkpoint)
        tokenizer = load_tokenizer(loaded.tokenizer_folder)
        prompts = encode(tokenizer, [question.prompt for question in questions])
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
        )
        own = registered()
        folder = Workdir(
            path,
            dataclasses.asdict(settings)
            | {"reinforce": dataclasses.asdict(config)}
            | ({"registered": own} if own else {}),
            CHANGEABLE,
            ADDED,
        )
        sampler = Sampler(
            loaded.model, config.sampling, longest=longest, new=config.max_new_tokens, batch_size=config.answers
        )
        learner = Learner(config, settings, loaded, layout)
        return cls(folder, tokenizer, loaded.tokenizer_folder, questions, prompts, sampler, layout, learner)


def _step(config: ReinforceConfig, setup: _Setup, step: int) -> Row:
    """Samples, rewards and learns."""
    asked = slice((step - 1) * config.prompts_per_step, step * config.prompts_per_step)
    group = range(config.group_size)
    prompts, questions = ([one for one in many[asked] for _ in group] for many in (setup.prompts, setup.questions))
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    results = setup.sampler(setup.learner.params, prompts, seed)
    decode = Decoder(setup.tokenizer)
    answers = [Answer(q, decode(r.tokens), r.tokens) for q, r in zip(questions, results, strict=True)]
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


def _save(saver: Saver, step: int, learner: Learner) -> None:
    saver.save(step, learner.state.weights, learner.state.optimizer, {})
    saver.wait()


def _line(row: Row, steps: int) -> str:
    return "  ".join(
        (
            f"step {row['step']:>{len(str(steps))}}/{steps}",
            f"reward {row['reward']:.3f}",
            f"exact {row['exact']:.3f}",
            *([] if row["kl"] is None else [f"kl {row['kl']:.4f}"]),
            f"grad norm {row['grad_norm']:.3f}",
            f"{row['tokens_per_evaluation']:.2f} tokens/evaluation",
            f"{row['seconds']:.1f} s",
        )
    )
