"""Learning rate and block size as functions of the step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.shares import floor_share
from twotower_jax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """A rate that rises linearly, stays, and at the end falls linearly (Hu et al. 2024, arXiv 2404.06395, section 4).

    Step s, counted from 0, of the first W steps has peak·(s + 1)/W; the last of all steps has `final`.

    Raises:
      ValueError: if warmup and decay do not fit into the steps.
    """

    peak: float
    final: float
    steps: int
    warmup_steps: int
    decay_steps: int

    def __post_init__(self):
        if self.warmup_steps < 0 or self.decay_steps < 0 or self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"steps={self.steps}"
            )

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The rate of a step, float32; `step` may be traced."""
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.float32(self.peak)
        if self.warmup_steps:
            rate *= jnp.minimum(1.0, (step + 1) / self.warmup_steps)
        if self.decay_steps:
            done = jnp.clip((step + 1 - (self.steps - self.decay_steps)) / self.decay_steps, 0.0, 1.0)
            rate += done * (self.final - self.peak)
        return rate


def learning_rate(config: TrainConfig) -> WarmupStableDecay:
    """The published recipe's shape, in fractions of the steps."""
    return WarmupStableDecay(
        peak=config.learning_rate,
        final=config.final_learning_rate,
        steps=config.steps,
        warmup_steps=floor_share(config.warmup_fraction, config.steps),
        decay_steps=floor_share(config.decay_fraction, config.steps),
    )


class BlockStage(NamedTuple):
    """In the steps start … stop − 1, counted from 0, blocks have `block_size` tokens."""

    start: int
    stop: int
    block_size: int


def block_stages(config: TrainConfig) -> tuple[BlockStage, ...]:
    """The stages of the block-size curriculum, in order; one stage where `block_size` is given.

    A backbone knows no blocks: its one stage has a whole sequence for a block.
    """
    if not config.two_towers:
        return (BlockStage(0, config.steps, config.sequence_length),)
    if config.block_size is not None:
        return (BlockStage(0, config.steps, config.block_size),)
    starts = [floor_share(fraction, config.steps) for fraction, _ in config.block_curriculum]
    sizes = [size for _, size in config.block_curriculum]
    return tuple(map(BlockStage, starts, [*starts[1:], config.steps], sizes))
