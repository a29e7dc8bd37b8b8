"""The model of launch/study.py: small enough that a cell of the study takes minutes, on three tasks that it can learn.

    python launch/train.py --config=configs/study.py --workdir=runs/study/backbone

Rows hold a question each, and blocks of 16 are those of the paper; so are the schedule, the times and the weight.
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 96,
            "hybrid_override_pattern": "M*-M*-",
            "mamba_num_heads": 6,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 192,
        }
    )
    config.data = "tasks:letter,getters,sort"
    config.reset_at_documents = True
    config.vocab_size = 576
    config.sequence_length = 128
    config.batch_size = 16
    config.block_size = 16
    config.steps = 1000
    config.optimizer = "muon"
    config.learning_rate = 3e-3
    config.final_learning_rate = 1e-4
    config.decay_fraction = 0.5
    config.weight_decay = 0.01
    config.log_every = 50
    config.checkpoint_every = 100
    config.keep_checkpoints = 1
    return config
