"""The dense MLP, as a layer of its own and as the experts' shared one."""

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.layers.common import ACTIVATIONS, Linear
from twotower_jax.layers.mixer import Pointwise, require_positive
from twotower_jax.parameters import Scope, normal


class MLP(nnx.Module):
    """Ungated: up, activation, down."""

    def __init__(self, config: ModelConfig, width: int, scope: Scope):
        self.activation = config.mlp_hidden_act
        up_std, down_std = stds(config)
        self.up_proj = Linear(
            scope.child("up_proj"), (config.hidden_size, width), ("embed", "mlp"), normal(up_std), config.mlp_bias
        )
        self.down_proj = Linear(
            scope.child("down_proj"), (width, config.hidden_size), ("mlp", "embed"), normal(down_std), config.mlp_bias
        )

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """(B, L, D) → (B, L, D)"""
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


def stds(config: ModelConfig) -> tuple[float, float]:
    """Standard deviations of up and down projections; the latter feeds the residual stream."""
    std = config.initializer_range
    return std, std / math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else std


class DenseMLP(MLP, Pointwise):
    """A layer that is an MLP."""

    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
        bidirectional: bool = False,
    ):
        super().__init__(config, config.intermediate_size, scope)

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        require_positive(config, "intermediate_size")

    @classmethod
    def check_mesh(cls, config: ModelConfig, shape: sharding.MeshShape, sequence_length: int) -> None:
        sharding.check_divides(sharding.TENSOR, shape.tensor, config.intermediate_size, "intermediate_size")

    @classmethod
    def flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        return 4 * config.hidden_size * config.intermediate_size

    @classmethod
    def infer(cls, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
        if "up_proj.weight" not in shapes:
            return None
        return {"intermediate_size": shapes["up_proj.weight"][0], "mlp_bias": "up_proj.bias" in shapes}
