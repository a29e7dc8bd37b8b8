"""The flags of every command that chooses a sampling strategy."""

from absl import flags

from twotower_jax.choices import STRATEGIES
from twotower_jax.paths import local_path
from twotower_jax.registry import run_file

STRATEGY = flags.DEFINE_string("strategy", "confidence", f"{', '.join(STRATEGIES)}, or one of --register.")
OPTIONS = flags.DEFINE_list(
    "strategy_options",
    [],
    "KNOB=VALUE, several with commas: knobs of the strategy, see twotower_jax/diffusion/strategies.",
)
REGISTER = flags.DEFINE_multi_string(
    "register", [], "A Python file that registers a strategy or schedule of your own; may be repeated."
)


def register() -> None:
    """Runs the files of --register.

    Raises:
      ValueError: if one of them cannot be run.
    """
    for path in REGISTER.value:
        run_file(local_path(path))


def options() -> dict[str, str]:
    """The knobs of --strategy_options, as text.

    Raises:
      ValueError: if it is not a list of KNOB=VALUE, or has a knob twice.
    """
    found = {}
    for text in OPTIONS.value:
        knob, given, value = text.partition("=")
        if not given or not knob or knob in found:
            raise ValueError(f"--strategy_options={text}: expected KNOB=VALUE, each knob once")
        found[knob] = value
    return found
