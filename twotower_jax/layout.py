"""How layers lie where nobody says it: stacked, so that those that repeat are scanned, or one by one."""

import jax

from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.parameters import count, parameter_table
from twotower_jax.two_tower import Backbone

# Parameters of a tower that a processor's caches hold.
_FEW = 4_000_000


def is_small(config: ModelConfig) -> bool:
    """Whether a tower is computed so quickly that compiling is what takes time.

    Then layers are better stacked and scanned, which compiles fewer of them. But a scan copies each layer's weights out
    of the stack, every time it comes to it, and where they do not stay in a processor's caches that takes several times
    as long as the rest: a token of `ar` with 100 million parameters a tower took 71 ms of processor time, and 11 ms
    with layers one by one.
    """
    return count(parameter_table(Backbone(config))) < _FEW


def decoding(config: ModelConfig) -> Execution:
    """The execution of a model that is loaded without one: on a CPU its layers lie one by one, unless they are small;
    elsewhere they are stacked."""
    return Execution(scan_layers=jax.default_backend() != "cpu" or is_small(config))
