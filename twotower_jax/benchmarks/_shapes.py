"""Models that several measurements share, without arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from twotower_jax.config import ModelConfig
from twotower_jax.parameters import Params, parameter_table, unflatten
from twotower_jax.train.config import freeze, shipped

NANO_PATTERN = "MEMEM*E" * 5 + "MEMEMEM*E" + "ME" * 4


class LayerShape(NamedTuple):
    """What kernels see of one model's layers.

    Attributes:
      name: in words.
      heads, head_dim, groups, state, chunk: of Mamba, H, P, G, N and Q.
      query_heads, kv_heads, query_dim: of attention.
    """

    name: str
    heads: int
    head_dim: int
    groups: int
    state: int
    chunk: int
    query_heads: int
    kv_heads: int
    query_dim: int

    @property
    def inner(self) -> int:
        """H·P."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """That the convolution runs over, H·P + 2·G·N."""
        return self.inner + 2 * self.groups * self.state


LAYERS = {
    "nano30b": LayerShape("the 30B model", 64, 64, 8, 128, 128, 32, 2, 128),
    "nano4b": LayerShape("Nano 4B", 96, 80, 8, 128, 256, 40, 8, 128),
}


def tiny_config() -> ModelConfig:
    """The shape of the model whose reference numbers were recorded."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        hybrid_override_pattern=NANO_PATTERN[:16],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=48,
        routed_scaling_factor=2.5,
    )


def demo_config() -> ModelConfig:
    """The shape of the demonstration model."""
    return of_file("tiny")


def small_config() -> ModelConfig:
    """99 million parameters a tower, more than a processor's caches hold."""
    return of_file("small100m")


def nano_config() -> ModelConfig:
    """The shape of the published model."""
    return of_file("nano30b")


def of_file(name: str) -> ModelConfig:
    """A config's model, over all of its vocabulary."""
    config = freeze(shipped(name))
    return config.model_config(config.vocab_size)


def abstract_params(module: nnx.Module) -> Params:
    """Shapes of a module's parameters, float32."""
    table = parameter_table(module)
    return unflatten({path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in table.items()})
