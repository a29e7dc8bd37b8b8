"""Mixture of experts with sigmoid routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), and the dense MLP."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.kernels.experts import ROUTING, Weights
from twotower_jax.kernels.numerics.choice import choose_experts
from twotower_jax.layers import expert_parallel
from twotower_jax.layers.common import ACTIVATIONS, Linear
from twotower_jax.parameters import GROUPS, LINEAR, Scope, at_rest, constant, normal, use

# Logical axes, for `sharding.local`.
_TOKENS = ("batch", "length", None)
_ROUTER_AXES = ((None, None), (None,))
_WEIGHT_AXES = Weights(
    up=sharding.AtRest(("experts", "embed", "expert_mlp")),
    down=sharding.AtRest(("experts", "expert_mlp", "embed")),
    up_bias=("experts", "expert_mlp"),
    down_bias=("experts", None),
)


class MLP(nnx.Module):
    """Ungated: up, activation, down."""

    def __init__(self, config: ModelConfig, width: int, scope: Scope):
        self.activation = config.mlp_hidden_act
        up_std, down_std = _stds(config)
        self.up_proj = Linear(
            scope.child("up_proj"), (config.hidden_size, width), ("embed", "mlp"), normal(up_std), config.mlp_bias
        )
        self.down_proj = Linear(
            scope.child("down_proj"), (width, config.hidden_size), ("mlp", "embed"), normal(down_std), config.mlp_bias
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, L, D) → (B, L, D)"""
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Router(nnx.Module):
    """Chooses the experts of each token.

    The choice is made on scores + bias in more bits than float32 has (`choose_experts`). The weights of the chosen are
    ordinary float32, unbiased, and carry the gradient.
    """

    def __init__(self, config: ModelConfig, scope: Scope):
        self.config = config
        self.weight = scope.declare(
            "weight",
            (config.hidden_size, config.n_routed_experts),
            ("embed", None),
            normal(config.initializer_range),
            layout=LINEAR,
        )
        self.bias = scope.declare(
            "e_score_correction_bias",
            (config.n_routed_experts,),
            (None,),
            constant(0.0),
            decay=False,
            float32=True,
            trainable=False,
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens (T, D) to the chosen experts (T, k) int32 and their weights (T, k) float32."""
        return self.route(x, use(self.weight, jnp.float32), use(self.bias, jnp.float32))

    def route(self, x: jax.Array, weight: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, given the router's weight (D, E) and bias (E,), float32."""
        config = self.config
        # Kept for the backward pass under any rematerialization.
        indices = checkpoint_name(self._choose(*jax.lax.stop_gradient((x, weight, bias))), ROUTING)
        logits = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        gates = jnp.take_along_axis(jax.nn.sigmoid(logits), indices, axis=-1)
        if config.norm_topk_prob:
            gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
        return indices, gates * config.routed_scaling_factor

    def choose(self, x: jax.Array) -> jax.Array:
        """The experts (T, k) int32 of tokens (T, D), best first."""
        return self(x)[0]

    def _choose(self, x, weight, bias):
        c = self.config
        return choose_experts(
            *(x, weight, bias), count=c.num_experts_per_tok, groups=c.n_group, kept_groups=c.topk_group
        )


class Routing(NamedTuple):
    """What a router did.

    Attributes:
      load: (E,) float32, each expert's number of tokens as a multiple of the even share.
      experts: (B, L, k) int32, those of each token, best first.
    """

    load: jax.Array
    experts: jax.Array


def load_of(experts: jax.Array, measured: jax.Array, count: int) -> jax.Array:
    """A router's load over some of the tokens: (count,) float32, `Routing.load` where they are all.

    Args:
      experts: (B, L, k) int32, those of each token.
      measured: (B, L) bool, the tokens; where there is none, the load is 0.
      count: E.
    """
    chosen = (experts[..., None] == jnp.arange(count)) & measured[..., None, None]
    tokens = jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32)
    even = jnp.sum(measured, dtype=jnp.float32) * (experts.shape[-1] / count)
    return tokens / jnp.maximum(even, experts.shape[-1] / count)


class Experts(nnx.Module):
    """Σ weight · expert(x) over the chosen experts, plus the shared expert. No capacity, no dropped tokens."""

    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
    ):
        self.activation = config.mlp_hidden_act
        self.backends = backends
        width, num_experts = config.moe_intermediate_size, config.n_routed_experts
        up_std, down_std = _stds(config)
        self.router = Router(config, scope.child("gate"))
        self.up = scope.declare(
            "experts.{e}.up_proj.weight",
            (config.hidden_size, width),
            ("embed", "expert_mlp"),
            normal(up_std),
            layout=LINEAR,
            experts=num_experts,
            scales=GROUPS,
        )
        self.down = scope.declare(
            "experts.{e}.down_proj.weight",
            (width, config.hidden_size),
            ("expert_mlp", "embed"),
            normal(down_std),
            layout=LINEAR,
            experts=num_experts,
            scales=GROUPS,
        )

        def bias(name: str, width: int, axis: str):
            if not config.mlp_bias:
                return None
            name = f"experts.{{e}}.{name}.bias"
            return scope.declare(name, (width,), (axis,), constant(0.0), experts=num_experts, decay=False)

        self.up_bias = bias("up_proj", width, "expert_mlp")
        self.down_bias = bias("down_proj", config.hidden_size, "embed")
        self.shared_experts = (
            MLP(config, config.moe_shared_expert_intermediate_size, scope.child("shared_experts"))
            if config.n_shared_experts
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, L, D) → (B, L, D)"""
        return self.with_routing(x)[0]

    def with_routing(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """(B, L, D) → (B, L, D), and which experts it went through."""
        routed = sharding.local(self._routed, (_TOKENS, _ROUTER_AXES, _WEIGHT_AXES), (_TOKENS, (None,), _TOKENS))
        router = use(self.router.weight, jnp.float32), use(self.router.bias, jnp.float32)
        biases = (None if b is None else use(b, x.dtype) for b in (self.up_bias, self.down_bias))
        y, tokens, chosen = routed(x, router, Weights(at_rest(self.up, x.dtype), at_rest(self.down, x.dtype), *biases))
        load = tokens * (tokens.size / (x.shape[0] * x.shape[1] * self.router.config.num_experts_per_tok))
        return (y if self.shared_experts is None else y + self.shared_experts(x)), Routing(load, chosen)

    def _routed(self, x, router, weights):
        """One device's tokens through the routed experts, which may be on other devices."""
        tokens = x.reshape(-1, x.shape[-1])
        indices, gates = self.router.route(tokens, *router)
        y = expert_parallel.expert_mlp(
            *(tokens, indices, gates, weights),
            activation=ACTIVATIONS[self.activation],
            implementation=self.backends.expert_mlp,
        )
        load = jnp.bincount(indices.reshape(-1), length=router[1].size).astype(jnp.float32)
        if over := sharding.dividing("batch", "length"):
            load = jax.lax.psum(load, over)
        return y.reshape(x.shape), load, indices.reshape(*x.shape[:2], -1)


def _stds(config: ModelConfig) -> tuple[float, float]:
    """Standard deviations of up and down projections; the latter feeds the residual stream."""
    std = config.initializer_range
    return std, std / math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else std
