"""What a layer kind is: a class that holds all that is particular to it.

Two entry points on the same projections, after what lies to the left of a token:

* `causal`: one run of tokens that see each other causally, after an optional cache. Training and prefill of the
  context, decoding, cache extension.
* `blockwise`: blocks side by side that see the context's memory before their left edge and all of themselves. Denoiser
  training (memory of a whole sequence) and denoising (memory of a cache).

Three things go from one to the other, each a tree of arrays of the kind's own, the batch first: the *memory* of a run;
the *cache*, what is kept of all tokens so far, zeros before the first; and the *news*, what a run adds to a cache.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from twotower_jax.config import ModelConfig
from twotower_jax.kernels import Backends
from twotower_jax.parameters import Scope
from twotower_jax.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Run:
    """What tokens (B, L) come with. A kind reads what concerns it.

    Attributes:
      cache_lengths: (B,) int32, the tokens that the cache holds of each row.
      lengths: (B,) int32, how many of the L tokens of each row are real, the rest being padding on the right that may
        change neither the cache nor any real token; None for all.
      document_start: (B, L) int32, the position of the first token that each one may know of; None for all. In
        `blockwise` every document starts with a block, or with tokens of its own that nobody asks about up to the
        first block border in it: a block sees all of itself.
      end: whether the cache after the real tokens is wanted: a memory may leave out what is for that alone.
      routing: whether `causal` too is to tell what was routed where, as the memory of a layer that does that.
      balance: whether the sums that balance routers are wanted with it.
      measured: (B, L) bool, the tokens that count in those sums; None for all.
    """

    cache_lengths: jax.Array | None = None
    lengths: jax.Array | None = None
    document_start: jax.Array | None = None
    end: bool = True
    routing: bool = False
    balance: bool = False
    measured: jax.Array | None = None


class Routing(NamedTuple):
    """What a layer that routes tokens to experts did, which `blockwise` may return with its result.

    Attributes:
      load: (E,) float32, each expert's number of tokens as a multiple of the even share.
      experts: (B, L, k) int32, those of each token, best first; None once it was looked at.
      tokens: (E,) float32, each expert's number of tokens, by which its router's bias can be balanced; or None.
      balance: (B,) float32, how uneven the router's scores are in each sequence, E Σ f P; where a run asks for it.
      z: (B,) float32, the squared logarithms of the normalizers of its scores, summed over each sequence; likewise.
    """

    load: jax.Array
    experts: jax.Array | None
    tokens: jax.Array | None = None
    balance: jax.Array | None = None
    z: jax.Array | None = None

    def over(self, measured: jax.Array | None) -> "Routing":
        """Without `experts`, and load and tokens of `measured` (B, L) bool alone, None for all; 0 where there are
        none."""
        if measured is None:
            return self._replace(experts=None)
        count, per_token = self.load.size, self.experts.shape[-1]
        chosen = (self.experts[..., None] == jnp.arange(count)) & measured[..., None, None]
        tokens = jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32)
        even = per_token / count
        load = tokens / jnp.maximum(jnp.sum(measured, dtype=jnp.float32) * even, even)
        return self._replace(load=load, experts=None, tokens=tokens)


class Mixer(nnx.Module):
    """A layer kind. Subclasses declare parameters in `__init__` and override what they need.

    As it stands here a cache is of a fixed size, and is replaced as a whole by the `end` of a run's memory: what a
    recurrence has. `Pointwise` is for kinds without a cache.

    Attributes:
      norm_after_modulation: the denoiser's norm(modulate(h)), or modulate(norm(h)).
      kept: names of `checkpoint_name` that rematerialization does not compute a second time.
      cache_axes: the logical axes of the cache's arrays, a tuple in place of each; None without a cache.
    """

    norm_after_modulation: bool = True
    kept: tuple[str, ...] = ()
    cache_axes: Any = None

    def __init__(self, config: ModelConfig, scope: Scope, backends: Backends, bidirectional: bool):
        """Declares the parameters.

        Args:
          scope: of the tensors `layers.{i}.mixer.…`.
          bidirectional: whether to average with a pass over each reversed block, where the kind has a direction.
        """
        raise NotImplementedError

    def causal(
        self,
        x: Float[Array, "B L D"],
        cache: Any = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Any]:
        """One run of tokens x (B, L, D) after `cache`, or from the start of a text.

        Returns:
          (B, L, D) and the run's memory.
        """
        raise NotImplementedError

    def blockwise(
        self,
        x: Float[Array, "B L D"],
        memory: Any,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Routing | None]:
        """Blocks of S tokens side by side, x (B, L, D), each after the context before its left edge.

        Args:
          memory: of the context's layer at the same depth over the whole sequence; or its cache, L then being S.

        Returns:
          (B, L, D), and what was routed where, if anything.
        """
        raise NotImplementedError

    # The cache.

    @classmethod
    def cache_shapes(cls, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """The cache of B texts with room for `capacity` positions, a `jax.ShapeDtypeStruct` in place of each array."""
        return None

    def first_cache(self, memory: Any, capacity: int) -> Any:
        """The cache after a run that began a text."""
        return self.news(memory)

    def news(self, memory: Any) -> Any:
        """What a run adds to the cache that it came after."""
        return memory.end

    def append(self, cache: Any, news: Any, before: Int[Array, " B"]) -> Any:
        """The cache, which holds `before` (B,) tokens, after the news."""
        return news

    def newest(self, cache: Any, before: Int[Array, " B"], width: int) -> Any:
        """The news since the cache held `before` (B,) tokens, at most `width` tokens ago."""
        return cache

    def keep(self, cache: Any, memory: Any, before: Int[Array, " B"], lengths: Int[Array, " B"]) -> Any:
        """The cache, which holds `before` (B,) tokens, after the first `lengths` (B,) tokens of a run without `end`."""
        raise NotImplementedError

    def published_cache(self, cache: Any) -> dict[str, jax.Array]:
        """The arrays of a cache by name, as the published code has them."""
        return {}

    # What a configuration says of the kind.

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Refuses a configuration that this kind cannot have.

        Raises:
          ValueError: saying what is wrong.
        """

    @classmethod
    def check_mesh(cls, config: ModelConfig, shape: MeshShape, sequence_length: int) -> None:
        """Refuses a mesh that cannot divide such a layer evenly.

        Raises:
          ValueError: naming the axis and what it does not divide.
        """

    @classmethod
    def flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        """Forward, for one token; see train/flops.py.

        Args:
          keys: that a query sees on average.
          scans: 2 where blocks are also read backward, else 1.
        """
        raise NotImplementedError

    @classmethod
    def kernel_flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        """What of `flops` ops of `kernels` compute. A compiled program does not show it: planning/predict.py."""
        return 0.0

    @classmethod
    def num_experts(cls, config: ModelConfig) -> int:
        """How many experts a layer has, each with tensors of its own."""
        return 0

    @classmethod
    def infer(cls, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
        """The values of a configuration that such tensors tell, by their names below `layers.{i}.mixer.`.

        None where they are of another kind. How a width is divided into heads and groups cannot be seen; any division
        will do.
        """
        return None


class Pointwise(Mixer):
    """A kind that sees its own token only; `__call__` takes (B, L, D) to (B, L, D)."""

    norm_after_modulation = False

    def causal(
        self,
        x: Float[Array, "B L D"],
        cache: None = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], None]:
        return self(x), None

    def blockwise(
        self,
        x: Float[Array, "B L D"],
        memory: None,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Routing | None]:
        return self(x), None

    def news(self, memory: None) -> None:
        return None


def require_positive(config: ModelConfig, *names: str) -> None:
    """
    Raises:
      ValueError: for a field that is not positive.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(
                f"{name}={getattr(config, name)} must be positive with layers {config.hybrid_override_pattern!r}"
            )


def require_divides(config: ModelConfig, small: str, large: str) -> None:
    """
    Raises:
      ValueError: if one field does not divide the other.
    """
    if getattr(config, large) % getattr(config, small):
        raise ValueError(f"{small}={getattr(config, small)} does not divide {large}={getattr(config, large)}")
