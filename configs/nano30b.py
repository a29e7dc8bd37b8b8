"""The published model and recipe: Nemotron-TwoTower 30B-A3B (arXiv 2606.26493).

    python launch/train.py --config=configs/nano30b.py --workdir=DIR --config.data=TEXT \\
        --config.init_from=BACKBONE

BACKBONE is a folder with nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16, as published or converted: both towers start
from it, and the context tower stays as it is. AdamW, warmup-stable-decay from 1e-4 to 1e-6, bfloat16, sequences of 8192
tokens in blocks of 32, 32 again and 16. The paper trained on about 2.1 T tokens; how these divide into steps, and the
lengths of the schedule's parts, are ours.

31,577,940,288 parameters a tower, 63,185,902,848 in all, of which 31.6 G train.

On a pod the same command on every host, with --distributed. The mesh is for 256 devices or another multiple of 128:
sixteen share the experts of a layer, eight divide each share of them at rest, and every other matrix by whole tiles of
rows (docs/guide/scale.md says why), and the rest take shares of the batch, which must be a multiple of the devices. On
hosts of eight GPUs --config.mesh.expert=8; on fewer devices a smaller fsdp or expert.
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config


def get_config() -> ConfigDict:
    config = base_config(
        model={
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*E" * 5 + "MEMEMEM*E" + "ME" * 4,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
        }
    )
    config.objective = "denoiser"
    config.vocab_size = 131072
    config.sequence_length = 8192
    config.batch_size = 256
    config.steps = 1_000_000  # 2.1 T tokens
    config.learning_rate = 1e-4
    config.final_learning_rate = 1e-6
    config.dtype = "bfloat16"
    config.remat = "layer"
    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.expert = 16
    config.validation_every = 5_000
    config.checkpoint_every = 1_000
    return config
