"""About 100 million parameters a tower, for one GPU or a few.

    python launch/train.py --config=configs/small100m.py --workdir=runs/backbone --config.data=TEXT
    python launch/train.py --config=configs/small100m.py --workdir=runs/denoiser --config.data=TEXT \\
        --config.objective=denoiser --config.init_from=runs/backbone

TEXT is a .txt or .jsonl file or a folder of them; a gigabyte or more is worth the model's while. The first command
trains a backbone, the second a denoiser on top of it, its context tower the frozen backbone.

99,124,272 parameters a tower with the whole vocabulary of 16,384. The pattern is the 30B model's, shortened.
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 512,
            "hybrid_override_pattern": "MEMEM*E" * 2 + "ME",
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "moe_shared_expert_intermediate_size": 512,
            "routed_scaling_factor": 2.5,
        }
    )
    config.vocab_size = 16384
    config.sequence_length = 2048
    config.batch_size = 32
    config.steps = 20_000
    config.learning_rate = 1e-3
    config.final_learning_rate = 1e-5
    config.dtype = "bfloat16"
    config.mesh.data = -1  # every GPU of the machine takes a share of the batch
    config.log_every = 20
    config.validation_every = 1_000
    config.checkpoint_every = 1_000
    return config
