"""Models that several measurements share, without arrays."""

import jax
import jax.numpy as jnp
from flax import nnx

from twotower_jax.config import ModelConfig
from twotower_jax.parameters import Params, parameter_table, unflatten

NANO_PATTERN = "MEMEM*E" * 5 + "MEMEMEM*E" + "ME" * 4


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
    """The shape of the demonstration model, configs/tiny.py."""
    return ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        hybrid_override_pattern="MEM*E",
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256,
        routed_scaling_factor=2.5,
    )


def nano_config() -> ModelConfig:
    """The shape of the published model."""
    return ModelConfig(
        vocab_size=131072,
        hidden_size=2688,
        hybrid_override_pattern=NANO_PATTERN,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    )


def small_config() -> ModelConfig:
    """The shape of configs/small100m.py: 99 million parameters a tower, more than a processor's caches hold."""
    return ModelConfig(
        vocab_size=16384,
        hidden_size=512,
        hybrid_override_pattern="MEMEM*E" * 2 + "ME",
        mamba_num_heads=16,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512,
        routed_scaling_factor=2.5,
    )


def abstract_params(module: nnx.Module) -> Params:
    """Shapes of a module's parameters, float32."""
    table = parameter_table(module)
    return unflatten({path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in table.items()})
