"""Reinforces a denoiser: it answers questions, and what is better than its other answers becomes more probable.

    python launch/reinforce.py --checkpoint=DIR --workdir=DIR --tasks=add --reward=words
    python launch/reinforce.py --checkpoint=DIR --workdir=DIR --questions=questions.jsonl

Questions are those of tasks (twotower_jax/data/tasks.py) or rows {"prompt": ..., "response": ...} of a file. --reward
names a Python function, one of twotower_jax/reinforce/rewards.py or of a file given as --register. The workdir is a
checkpoint as launch/train.py writes it, and the same command goes on with it. docs/guide/finetuning.md says what is
optimized.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import functools
import sys

from twotower_jax.train import stopping

stopping.listen()  # now, because the imports below take seconds

from absl import flags

from twotower_jax import command_line, strategy_flags
from twotower_jax.choices import REWARDS

flags.adopt_module_key_flags(strategy_flags)
_CHECKPOINT = command_line.DEFINE_path("checkpoint", None, "Folder of the checkpoint to start from.", required=True)
_WORKDIR = command_line.DEFINE_path("workdir", None, "Where checkpoints and metrics go.", required=True)
_TASKS = flags.DEFINE_list("tasks", [], "Ask questions of these tasks, several with commas.")
_QUESTIONS = command_line.DEFINE_path(
    "questions", None, 'Ask those of a JSON Lines file: {"prompt": …, "response": …}.'
)
_HELD_OUT = command_line.DEFINE_path(
    "held_out", None, "Such a file of questions that teach nothing: asked before the first step and after the last."
)
_REWARD = flags.DEFINE_string("reward", "exact", f"{', '.join(REWARDS)}, or one of --register.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps, each with new answers.")
_PROMPTS = flags.DEFINE_integer("prompts_per_step", 8, "Questions of a step.")
_GROUP = flags.DEFINE_integer("group_size", 8, "Answers to each, which are compared.")
_UPDATES = flags.DEFINE_integer("updates", 1, "Updates of the weights from the answers of a step.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens of an answer, at most.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Tokens denoised together; default: what was trained, or 16.")
_STEPS_PER_BLOCK = flags.DEFINE_integer(
    "steps_per_block", None, "Most denoiser evaluations per block; default: the block size."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of sampling, more than 0.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-5, "The same in all steps.")
_CLIP = flags.DEFINE_float("clip", 0.2, "How far a token's probability ratio may go in a step and still pay.")
_KL = flags.DEFINE_float("kl", 0.01, "Cost of a nat of divergence from the start, a token; 0: free.")
_SEED = flags.DEFINE_integer("seed", 0, "Of questions and sampling.")
_ROWS = flags.DEFINE_integer("rows", 16, "Rows of the training pass computed together.")
_EVERY = flags.DEFINE_integer("checkpoint_every", 0, "Save after so many steps; 0: at the end.")
_VALIDATION_EVERY = flags.DEFINE_integer("validation_every", 0, "Ask --held_out after so many steps as well.")

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.files import check_folder
from twotower_jax.generation.trained import trained_block_size, untrained_denoiser
from twotower_jax.paths import as_path
from twotower_jax.reinforce.loop import ReinforceConfig, reinforce
from twotower_jax.reinforce.questions import all_of_file, from_file, from_tasks


def main() -> None:
    strategy_flags.register()
    folder = as_path(_CHECKPOINT.value)
    check_folder(folder, "give a Hugging Face folder, a converted one or a workdir")
    if bool(_TASKS.value) == (_QUESTIONS.value is not None):
        raise ValueError("give either --tasks=NAME,… or --questions=FILE.jsonl")
    block_size = _BLOCK_SIZE.value or trained_block_size(folder) or SamplingConfig.block_size
    config = ReinforceConfig(
        checkpoint=str(folder),
        asked=_QUESTIONS.value or ",".join(_TASKS.value),
        reward=_REWARD.value,
        steps=_STEPS.value,
        prompts_per_step=_PROMPTS.value,
        group_size=_GROUP.value,
        updates=_UPDATES.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=SamplingConfig(
            block_size=block_size,
            steps_per_block=block_size if _STEPS_PER_BLOCK.value is None else _STEPS_PER_BLOCK.value,
            strategy=strategy_flags.STRATEGY.value,
            strategy_options=strategy_flags.options(),
            temperature=_TEMPERATURE.value,
        ),
        learning_rate=_LEARNING_RATE.value,
        clip=_CLIP.value,
        kl=_KL.value,
        seed=_SEED.value,
        rows=_ROWS.value,
        checkpoint_every=_EVERY.value,
        validation_every=_VALIDATION_EVERY.value,
    )
    asked = config.steps * config.prompts_per_step, config.seed
    questions = from_file(_QUESTIONS.value, *asked) if _QUESTIONS.value else from_tasks(_TASKS.value, *asked)
    if config.validation_every and _HELD_OUT.value is None:
        raise ValueError(f"--validation_every={config.validation_every} needs --held_out=FILE.jsonl")
    held_out = all_of_file(_HELD_OUT.value) if _HELD_OUT.value else []
    if untrained_denoiser(folder):
        print(
            f"warning: {folder} is a backbone: its denoiser never trained, and all answers are noise", file=sys.stderr
        )
    say = functools.partial(print, flush=True)
    step = reinforce(config, _WORKDIR.value, questions, say, held_out=held_out, stop=stopping.requested).step
    if step < config.steps:
        said = f"stopped by {stopping.requested()} at step {step}; run the same command again to go on"
        print(said, file=sys.stderr)
        sys.exit(stopping.STOPPED)


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
