"""One layer: norm, mixer, residual, and their time-conditioned form."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from twotower_jax import sharding
from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.layers import registry
from twotower_jax.layers.common import RMSNorm
from twotower_jax.layers.mixer import Routing, Run
from twotower_jax.layers.time_conditioning import Modulation
from twotower_jax.parameters import Scope


class Layer(nnx.Module):
    """h + mixer(norm(h)), or its time-conditioned form in the denoiser; the mixer is of the kind of a letter."""

    def __init__(self, config: ModelConfig, letter: str, scope: Scope, execution: Execution, bidirectional: bool):
        self.dtype = execution.dtype
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, scope.child("norm"))
        self.mixer = registry.kind(letter)(config, scope.child("mixer"), execution.backends, bidirectional)

    def causal(
        self,
        h: Float[Array, "B L D"],
        cache: Any = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Any]:
        """One run of tokens h (B, L, D) after `cache`; returns the new h and the layer's memory of the run."""
        y, memory = self.mixer.causal(self._enter(h, None), cache, run)
        return self._leave(h, y, None), memory

    def blockwise(
        self,
        h: Float[Array, "B L D"],
        memory: Any,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
        modulation: Modulation | None = None,
    ) -> tuple[Float[Array, "B L D"], Routing | None]:
        """Blocks h (B, L, D) side by side, reading the context layer's memory (or cache) before each left edge.

        Returns:
          the new h, and of a layer that routes tokens what it did.
        """
        y, routing = self.mixer.blockwise(self._enter(h, modulation), memory, block_size, run)
        return self._leave(h, y, modulation), routing

    def _enter(self, h, modulation):
        x = h.astype(self.dtype)
        if modulation is None:
            return self.norm(x)
        # The published training code fuses some norms into the projection, which fixes the order by layer kind.
        if self.mixer.norm_after_modulation:
            return self.norm(modulation.modulate(x))
        return modulation.modulate(self.norm(x))

    def _leave(self, h, y, modulation):
        h = h + (y if modulation is None else modulation.gate * y).astype(h.dtype)
        return sharding.constrain(h, ("batch", "length", None))
