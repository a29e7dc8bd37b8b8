"""What a context tower keeps of the tokens so far, row by row."""

import flax.struct
import jax
from jaxtyping import Array, Bool, Int

from twotower_jax import stack
from twotower_jax.stack import PerLayer


@flax.struct.dataclass
class Cache:
    """What a context tower keeps of the tokens so far. `Tower` makes, extends and updates one.

    Attributes:
      layers: what each layer keeps; None for one that keeps nothing.
      lengths: (B,) int32, tokens so far in each row.
    """

    layers: PerLayer
    lengths: jax.Array

    def take_rows(self, rows: Int[Array, " R"]) -> "Cache":
        """The rows (R,) int32 as a cache of their own; an index out of range gives the last row."""
        return Cache(self.layers.take_rows(rows), stack.take_rows(rows, 0, self.lengths))

    def put_rows(self, rows: Int[Array, " R"], part: "Cache") -> "Cache":
        """With the rows (R,) int32, all different, replaced by those of `part`; none for one out of range."""
        return Cache(self.layers.put_rows(rows, part.layers), stack.put_rows(rows, 0, self.lengths, part.lengths))

    def clear_rows(self, cleared: Bool[Array, " B"]) -> "Cache":
        """With the rows of `cleared` (B,) bool as those of texts that have not begun."""
        return Cache(self.layers.clear_rows(cleared), stack.clear_rows(cleared, 0, self.lengths))
