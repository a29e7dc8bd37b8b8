"""Trains a backbone or a denoiser.

    python launch/train.py --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE …]

Goes on from the newest checkpoint if DIR holds one. The fields are listed, one comment each, in
twotower_jax/train/config.py; exit statuses and what the lines mean in docs/guide/training.md.

As one process of several, on each of them the same command with its own number:

    python launch/train.py … --coordinator=HOST:PORT --num_processes=N --process_id=I

or with --distributed alone where JAX finds these out: on TPU pods, under Slurm and Open MPI.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import sys

from twotower_jax.train import stopping, supervisor

if any(argument.startswith(("--coordinator", "--distributed")) for argument in sys.argv):
    supervisor.supervise()
stopping.listen()  # now, because the imports below take seconds

from absl import flags
from ml_collections import config_flags

from twotower_jax import command_line

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/ or your own.", lock_config=True)
WORKDIR = command_line.DEFINE_path("workdir", None, "Where checkpoints and metrics go.")
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST; traces these steps into the workdir's profile/.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for a run of several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is.", lower_bound=0)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes that JAX finds by itself.")
flags.mark_flags_as_required(["config", "workdir"])

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.files import CheckpointError
from twotower_jax.paths import as_path
from twotower_jax.train import distributed
from twotower_jax.train.config import check_given, freeze
from twotower_jax.train.loop import TrainResult, train
from twotower_jax.train.watch import Profile

# Exit statuses; 0 is done, 75 stopped and to be run again. The first kind that fits counts.
STATUSES = {
    CheckpointError: command_line.BROKEN_CHECKPOINT,
    distributed.ProcessLost: supervisor.PROCESS_LOST,
    FloatingPointError: command_line.DIVERGED,
    SaveError: command_line.NOT_SAVED,
    ValueError: command_line.USAGE,
    OSError: command_line.USAGE,
}


def main() -> None:
    try:
        result = _train()
    except KeyboardInterrupt:
        _leave("error: interrupted twice, nothing saved; run the same command again to go on", 130, together=False)
    except BrokenPipeError:  # Whoever read the output has closed it.
        distributed.leave(command_line.CLOSED_PIPE, together=False)
        raise
    except tuple(STATUSES) as error:
        status = next(status for kind, status in STATUSES.items() if isinstance(error, kind))
        _leave(f"error: {command_line.said(error)}", status, together=isinstance(error, FloatingPointError))
    if result.stopped:
        what = f"stopped by {result.stopped} at step {result.step}; run the same command again to go on"
        _leave(what, stopping.STOPPED, together=True)
    distributed.leave(0, together=True)


def _train() -> TrainResult:
    config = freeze(CONFIG.value)
    notes = check_given(config, config_flags.get_override_values(flags.FLAGS["config"]))
    numbers = NUM_PROCESSES.value, PROCESS_ID.value
    if (None in numbers) if COORDINATOR.value else (numbers != (None, None)):
        raise ValueError("--coordinator, --num_processes and --process_id belong together")
    if COORDINATOR.value or DISTRIBUTED.value:
        distributed.initialize(COORDINATOR.value, *numbers)
    workdir = WORKDIR.value
    profile = Profile.parse(PROFILE_STEPS.value, as_path(workdir) / "profile") if PROFILE_STEPS.value else None
    if profile is not None and profile.first > config.steps:
        raise ValueError(f"--profile_steps={PROFILE_STEPS.value} lies beyond steps={config.steps}")
    return train(config, workdir, stop=stopping.requested, profile=profile, notes=notes)


def _leave(message: str, status: int, *, together: bool) -> None:
    print(command_line.one_line(message), file=sys.stderr, flush=True)
    distributed.leave(status, together=together)
    sys.exit(status)


if __name__ == "__main__":
    command_line.run(main)
