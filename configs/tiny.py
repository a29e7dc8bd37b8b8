"""A demonstration for two CPU cores.

    python launch/train.py --config=configs/tiny.py --workdir=runs/backbone
    python launch/train.py --config=configs/tiny.py --workdir=runs/denoiser \\
        --config.objective=denoiser --config.init_from=runs/backbone

Each takes some minutes (launch/quickstart.py --data=python runs both). Expect validation losses near 3.6 of the
backbone on next tokens and 5.0 of the denoiser on masked ones, over a vocabulary of 1024.
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 128,
            "hybrid_override_pattern": "MEM*E",
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 2,
            "chunk_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "moe_shared_expert_intermediate_size": 256,
            "routed_scaling_factor": 2.5,
        }
    )
    config.vocab_size = 1024
    config.steps = 320
    config.learning_rate = 3e-3
    config.final_learning_rate = 3e-5
    config.block_size = 16
    return config
