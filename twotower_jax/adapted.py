"""A matrix with a low-rank update beside it (LoRA, Hu et al. 2021, arXiv 2106.09685), as one value.

`Adapted` stands in place of a matrix among the parameters, as a `Quantized` one does: only who multiplies with it has
to know (layers/common.py). lora.py says which matrices get one, and puts it there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower_jax import randomness
from twotower_jax.kernels.numerics.quantized import Quantized

Axes = tuple[str | None, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "keys"], meta_fields=["scale", "dropout"]
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Stands for the matrix base + scale · a · b, (…, in, out), which is never made.

    A pytree; leading axes are those of `base`, where layers are stacked.

    Attributes:
      base: (…, in, out), an array or `Quantized`.
      a: (…, in, r). b: (…, r, out).
      keys: (…, R, 2) uint32, the data of a random key for each row that is multiplied; None without dropout.
      scale: alpha / r.
      dropout: the share of the numbers of x that the update does not see, where there are keys.
    """

    base: Float[Array, "*leading fan_in fan_out"] | Quantized
    a: Float[Array, "*leading fan_in r"]
    b: Float[Array, "*leading r fan_out"]
    keys: jax.Array | None
    scale: float
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for, (…, in, out)."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def cast(self, dtype: jnp.dtype) -> "Adapted":
        """With its arrays as `dtype`; a quantized base stays as it is."""
        base = self.base if isinstance(self.base, Quantized) else self.base.astype(dtype)
        return dataclasses.replace(self, base=base, a=self.a.astype(dtype), b=self.b.astype(dtype))

    def map_arrays(self, function: Callable[[jax.Array, Axes], Any], axes: Axes) -> "Adapted":
        """`function(array, its logical axes)` of every array but the keys; `axes` are the matrix's own."""
        *leading, fan_in, fan_out = axes
        return dataclasses.replace(
            self,
            base=jax.tree.map(lambda v: function(v, axes), self.base),
            a=function(self.a, (*leading, fan_in, None)),
            b=function(self.b, (*leading, None, fan_out)),
        )

    def arranged(self, arrange: Callable[[jax.Array], jax.Array]) -> "Adapted":
        """With its columns reordered by `arrange`."""
        return dataclasses.replace(self, base=jax.tree.map(arrange, self.base), b=arrange(self.b))

    def seen(self, x: Float[Array, "R ... fan_in"]) -> Float[Array, "R ... fan_in"]:
        """What the update sees of x: all of it, or under dropout what is left, scaled up. R rows, each by its key."""
        if self.keys is None or not self.dropout:
            return x
        keep = 1 - self.dropout
        keys = jax.random.wrap_key_data(self.keys, impl=randomness.IMPLEMENTATION)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))
