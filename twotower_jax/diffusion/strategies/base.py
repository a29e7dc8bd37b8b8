"""What a sampling strategy is: a frozen dataclass of its knobs that takes one row's block and returns its new block."""

import abc
import dataclasses
import math
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower_jax.registry import Registry


class Draft(NamedTuple):
    """One row's block before a step, and the denoiser's predictions for it.

    xt             (S,) int32     the block, the mask token where undecided
    masked         (S,) bool      where it is
    logits         (S, V) float32 the denoiser's, the mask token's being −∞
    tokens         (S,) int32     the prediction for each position
    confidence     (S,) float32   its probability, untempered; NaN where the logits are no distribution
    key            ()             for the strategy's own draws
    step           () int32       index of the step in the block
    steps          int, or () int32 where rows differ: T, the most there may be
    mask_token_id  int
    """

    xt: jax.Array
    masked: jax.Array
    logits: jax.Array
    tokens: jax.Array
    confidence: jax.Array
    key: jax.Array
    step: jax.Array
    steps: int | jax.Array
    mask_token_id: int

    @property
    def num_masked(self) -> Int[Array, ""]:
        """() int32."""
        return jnp.sum(self.masked, dtype=jnp.int32)

    @property
    def required(self) -> Int[Array, ""]:
        """ceil(masked / steps left), () int32: so many commits per step end the block evenly and in time."""
        steps_left = self.steps - self.step
        return (self.num_masked + steps_left - 1) // steps_left

    def commit(self, chosen: Bool[Array, " S"]) -> Int[Array, " S"]:
        """The block with the predictions at the masked positions that are `chosen`, (S,) bool."""
        return jnp.where(chosen & self.masked, self.tokens.astype(self.xt.dtype), self.xt)


class Strategy(abc.ABC):
    """A sampling strategy. A subclass is registered, which makes it a frozen dataclass and a pytree:

        @STRATEGIES.register("margin")
        @strategy
        class Margin(Strategy):
            least: float = 0.1
            def new_block(self, draft): ...

    Fields of type float and int are knobs: leaves of the pytree, so that compiled functions take them as arguments, one
    value per row. All others are compiled in. `check` is called with the values that a user gave. Whatever a strategy
    does, `sample_step` keeps a block without masks as it is and commits all that is masked in the last step.
    """

    @abc.abstractmethod
    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        """The block after the step, (S,) int32: predictions committed, or tokens masked again."""

    def check(self) -> None:  # noqa: B027 (nothing to check is a check)
        """Raises ValueError for knobs out of range."""

    def check_between(self, least: float, most: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not least <= value <= most or math.isinf(value):
                raise ValueError(f"{name}={value} must be between {least:g} and {most:g}")


def strategy(cls: type) -> type:
    """Makes a subclass of `Strategy` a frozen dataclass and a pytree whose leaves are its numbers."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    knobs = [name for name in names if hints[name] in (float, int)]
    fixed = [name for name in names if name not in knobs]

    def flatten(value):
        return [getattr(value, name) for name in knobs], tuple(getattr(value, name) for name in fixed)

    def unflatten(static, leaves):
        value = object.__new__(cls)  # Leaves may be traced, or no numbers at all.
        for name, leaf in [*zip(knobs, leaves, strict=True), *zip(fixed, static, strict=True)]:
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


STRATEGIES = Registry("strategy", Strategy)


def per_row(strategy: Strategy, rows: int) -> Strategy:
    """With each knob an array (rows,): float32, or int32."""

    def spread(knob):
        dtype = (
            jnp.int32 if isinstance(knob, int) or jnp.issubdtype(jnp.result_type(knob), jnp.integer) else jnp.float32
        )
        return jnp.broadcast_to(jnp.asarray(knob, dtype), (rows,))

    return jax.tree.map(spread, strategy)


def knobs(name: str) -> list[str]:
    """The names of a strategy's knobs. Raises ValueError for an unknown strategy."""
    return [field.name for field in dataclasses.fields(STRATEGIES[name])]


def make_strategy(name: str, options: dict[str, Any]) -> Strategy:
    """The strategy of this name with these knobs, which may be given as text.

    Raises:
      ValueError: for an unknown name, knob or value.
    """
    cls, has_knobs = STRATEGIES[name], knobs(name)
    hints, values = typing.get_type_hints(cls), {}
    for knob, value in options.items():
        if knob not in has_knobs:
            has = f"its knobs are {', '.join(has_knobs)}" if has_knobs else "it has no knobs"
            raise ValueError(f"{knob}={value!r} changes nothing with strategy={name!r}: {has}")
        try:
            values[knob] = hints[knob](value) if hints[knob] in (float, int, str) else value
        except (TypeError, ValueError):
            raise ValueError(f"{knob}={value!r} of strategy={name!r} must be {hints[knob].__name__}") from None
    made = cls(**values)
    made.check()
    return made


def before(rank_by: Float[Array, " S"], masked: Bool[Array, " S"]) -> Bool[Array, "S S"]:
    """(S, S) bool: whether the masked position of the column comes before the row's, `rank_by` (S,) being higher, or
    equal and farther left."""
    # Where a NaN ranks does not matter: `sample_step` commits none and reports the row.
    mine, other = rank_by[:, None], rank_by[None, :]
    place = jnp.arange(rank_by.size)
    # Compared, not sorted: blocks are short, and a sort goes through them one by one.
    return masked[None, :] & ((other > mine) | ((other == mine) & (place[None, :] < place[:, None])))


def surest(count: Int[Array, ""], masked: Bool[Array, " S"], confidence: Float[Array, " S"]) -> Bool[Array, " S"]:
    """The `count` masked positions of highest confidence, the leftmost of equals first. (S,) bool."""
    return masked & (jnp.sum(before(confidence, masked), axis=1) < count)
