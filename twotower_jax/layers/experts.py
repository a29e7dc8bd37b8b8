"""Mixture of experts with sigmoid routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.kernels.experts import ROUTING, Weights
from twotower_jax.kernels.numerics.choice import choose_experts
from twotower_jax.layers import expert_parallel
from twotower_jax.layers.common import ACTIVATIONS, Linear
from twotower_jax.layers.mixer import Pointwise, Routing, Run, require_divides, require_positive
from twotower_jax.layers.mlp import MLP, stds
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
            balanced=True,
        )

    def __call__(self, x: Float[Array, "T D"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """Tokens (T, D) to the chosen experts (T, k) int32 and their weights (T, k) float32."""
        return self.route(x, use(self.weight, jnp.float32), use(self.bias, jnp.float32))

    def route(
        self, x: Float[Array, "T D"], weight: Float[Array, "D E"], bias: Float[Array, " E"]
    ) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """The same, given the router's weight (D, E) and bias (E,), float32."""
        config = self.config
        # Kept for the backward pass under any rematerialization.
        indices = checkpoint_name(self._choose(*jax.lax.stop_gradient((x, weight, bias))), ROUTING)
        logits = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        gates = jnp.take_along_axis(jax.nn.sigmoid(logits), indices, axis=-1)
        if config.norm_topk_prob:
            gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
        return indices, gates * config.routed_scaling_factor

    def choose(self, x: Float[Array, "T D"]) -> Int[Array, "T k"]:
        """The experts (T, k) int32 of tokens (T, D), best first."""
        return self(x)[0]

    def sums(
        self, x: Float[Array, "B L D"], measured: Bool[Array, "B L"] | None
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """What balances the router, of each sequence of tokens x (B, L, D) that are `measured`, None for all.

        With s the scores σ(x W), E Σ_e f_e P_e: f_e the share of the tokens' k best scores, without the bias, that are
        expert e's, which gets no gradient, and P_e the mean of s_e / Σ s (DeepSeek-V3, arXiv 2412.19437, equations 17
        to 20); 1 where either is even. And Σ (log Σ_e exp(x W)_e)² over the tokens (ST-MoE, arXiv 2202.08906,
        equation 5). Both (B,) float32, 0 for a sequence without tokens.
        """
        count, per_token = self.config.n_routed_experts, self.config.num_experts_per_tok
        measured = jnp.ones(x.shape[:2], bool) if measured is None else measured
        here = measured[..., None].astype(jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), use(self.weight, jnp.float32), precision=jax.lax.Precision.HIGHEST)
        scores = jax.nn.sigmoid(logits)
        best = jax.lax.top_k(jax.lax.stop_gradient(scores), per_token)[1]
        chosen = jnp.sum(best[..., None] == jnp.arange(count), axis=2, dtype=jnp.float32)
        tokens = jnp.maximum(jnp.sum(here, axis=1), 1)
        shares = jnp.sum(chosen * here, axis=1) / (tokens * per_token)
        means = jnp.sum(scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20) * here, axis=1) / tokens
        z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * here[..., 0], axis=1)
        return count * jnp.sum(shares * means, axis=-1), z

    def _choose(self, x, weight, bias):
        c = self.config
        return choose_experts(
            *(x, weight, bias), count=c.num_experts_per_tok, groups=c.n_group, kept_groups=c.topk_group
        )


class Experts(Pointwise):
    """Σ weight · expert(x) over the chosen experts, plus the shared expert. No capacity, no dropped tokens.

    With `moe_latent_size` the routed experts work in a smaller space, fc2(Σ weight · expert(fc1(x))); router and shared
    expert read x itself (Nemotron 3 Super).
    """

    kept = (ROUTING,)

    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
        bidirectional: bool = False,
    ):
        self.activation = config.mlp_hidden_act
        self.backends = backends
        width, num_experts = config.moe_intermediate_size, config.n_routed_experts
        up_std, down_std = stds(config)
        self.router = Router(config, scope.child("gate"))

        def latent(name: str, shape: tuple[int, int], axes: tuple[str | None, str | None], std: float):
            if not config.moe_latent_size:
                return None
            return Linear(scope.child(name), shape, axes, normal(std), config.mlp_bias)

        sizes = (config.hidden_size, config.moe_latent_size)
        self.fc1_latent_proj = latent("fc1_latent_proj", sizes, ("embed", None), up_std)
        self.fc2_latent_proj = latent("fc2_latent_proj", sizes[::-1], (None, "embed"), down_std)
        if config.moe_latent_size:
            down_std = up_std  # fc2 feeds the residual stream in place of the experts.
        self.up = scope.declare(
            "experts.{e}.up_proj.weight",
            (config.expert_input_size, width),
            ("embed", "expert_mlp"),
            normal(up_std),
            layout=LINEAR,
            experts=num_experts,
            scales=GROUPS,
        )
        self.down = scope.declare(
            "experts.{e}.down_proj.weight",
            (width, config.expert_input_size),
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
        self.down_bias = bias("down_proj", config.expert_input_size, "embed")
        self.shared_experts = (
            MLP(config, config.moe_shared_expert_intermediate_size, scope.child("shared_experts"))
            if config.n_shared_experts
            else None
        )

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """(B, L, D) → (B, L, D)"""
        return self.with_routing(x)[0]

    def blockwise(
        self,
        x: Float[Array, "B L D"],
        memory: None,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Routing]:
        return self.with_routing(x, run)

    def causal(
        self,
        x: Float[Array, "B L D"],
        cache: None = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Routing | None]:
        y, routing = self.with_routing(x, run)
        return y, routing if run.routing else None

    def with_routing(
        self,
        x: Float[Array, "B L D"],
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], Routing]:
        """(B, L, D) → (B, L, D), and which experts it went through."""
        latent = None if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        axes = (_TOKENS, _TOKENS, _ROUTER_AXES, _WEIGHT_AXES)
        routed = sharding.local(self._routed, axes, (_TOKENS, (None,), _TOKENS))
        router = use(self.router.weight, jnp.float32), use(self.router.bias, jnp.float32)
        biases = (None if b is None else use(b, x.dtype) for b in (self.up_bias, self.down_bias))
        weights = Weights(at_rest(self.up, x.dtype), at_rest(self.down, x.dtype), *biases)
        y, tokens, chosen = routed(x, latent, router, weights)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        load = tokens * (tokens.size / (x.shape[0] * x.shape[1] * self.router.config.num_experts_per_tok))
        sums = self.router.sums(x, run.measured) if run.balance else ()
        return (y if self.shared_experts is None else y + self.shared_experts(x)), Routing(load, chosen, tokens, *sums)

    def _routed(self, x, latent, router, weights):
        """One device's tokens through the routed experts, which may be on other devices and read `latent` where it is
        given."""
        tokens = x.reshape(-1, x.shape[-1])
        indices, gates = self.router.route(tokens, *router)
        read = x if latent is None else latent
        y = expert_parallel.expert_mlp(
            *(tokens if latent is None else latent.reshape(-1, latent.shape[-1]), indices, gates, weights),
            activation=ACTIVATIONS[self.activation],
            implementation=self.backends.expert_mlp,
        )
        load = jnp.bincount(indices.reshape(-1), length=router[1].size).astype(jnp.float32)
        if over := sharding.dividing("batch", "length"):
            load = jax.lax.psum(load, over)
        return y.reshape(read.shape), load, indices.reshape(*x.shape[:2], -1)

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        require_positive(
            config, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"
        )
        require_divides(config, "n_group", "n_routed_experts")
        if config.topk_group > config.n_group:
            raise ValueError(f"topk_group={config.topk_group} exceeds n_group={config.n_group}")
        if config.num_experts_per_tok > config.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={config.num_experts_per_tok} exceeds n_routed_experts={config.n_routed_experts}"
            )
        if config.n_group > 1 and config.n_routed_experts // config.n_group < 2:
            raise ValueError(
                f"n_group={config.n_group} leaves fewer than two of n_routed_experts={config.n_routed_experts} in a "
                "group, and a group is scored by its best two"
            )
        if config.moe_latent_size < 0:
            raise ValueError(f"moe_latent_size={config.moe_latent_size} must not be negative")
        if config.n_shared_experts not in (0, 1):
            raise ValueError(f"n_shared_experts={config.n_shared_experts} must be 0 or 1")
        if config.n_shared_experts and config.moe_shared_expert_intermediate_size <= 0:
            raise ValueError(
                f"n_shared_experts={config.n_shared_experts} needs a positive moe_shared_expert_intermediate_size, "
                f"not {config.moe_shared_expert_intermediate_size}"
            )

    @classmethod
    def check_mesh(cls, config: ModelConfig, shape: sharding.MeshShape, sequence_length: int) -> None:
        sharding.check_divides(sharding.EXPERT, shape.expert, config.n_routed_experts, "n_routed_experts")
        sharding.check_divides(sharding.TENSOR, shape.tensor, config.moe_intermediate_size, "moe_intermediate_size")
        if config.n_shared_experts:
            name = "moe_shared_expert_intermediate_size"
            sharding.check_divides(sharding.TENSOR, shape.tensor, getattr(config, name), name)

    @classmethod
    def flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        shared = config.moe_shared_expert_intermediate_size if config.n_shared_experts else 0
        whole = 2 * config.n_routed_experts + 4 * (shared + config.moe_latent_size)
        return config.hidden_size * whole + cls.kernel_flops(config, keys, scans)

    @classmethod
    def kernel_flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        return 4 * config.expert_input_size * config.num_experts_per_tok * config.moe_intermediate_size

    @classmethod
    def num_experts(cls, config: ModelConfig) -> int:
        return config.n_routed_experts

    @classmethod
    def infer(cls, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
        if "gate.weight" not in shapes:
            return None
        shared = "shared_experts.up_proj.weight" in shapes
        values = {
            "n_routed_experts": shapes["gate.weight"][0],
            "num_experts_per_tok": 1,
            "moe_intermediate_size": shapes["experts.0.up_proj.weight"][0],
            "n_shared_experts": int(shared),
            "mlp_bias": "experts.0.up_proj.bias" in shapes,
        }
        if "fc1_latent_proj.weight" in shapes:
            values["moe_latent_size"] = shapes["fc1_latent_proj.weight"][0]
        if shared:
            values["moe_shared_expert_intermediate_size"] = shapes["shared_experts.up_proj.weight"][0]
        return values
