"""The model and the recipe of launch/quickstart.py: the tasks of twotower_jax/data/tasks.py.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/tasks/backbone
    python launch/train.py --config=configs/quickstart.py --workdir=runs/tasks/denoiser \\
        --config.objective=denoiser --config.init_from=runs/tasks/backbone
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 128,
            "hybrid_override_pattern": "M*M*-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 256,
        }
    )
    config.data = "tasks"
    config.reset_at_documents = True
    config.vocab_size = 576
    config.sequence_length = 192
    config.batch_size = 24
    config.accumulate = 4
    config.block_size = 32
    config.steps = 1000
    config.learning_rate = 3e-3
    config.final_learning_rate = 3e-5
    config.adam_betas = (0.9, 0.95)
    config.weight_decay = 0.01
    return config
