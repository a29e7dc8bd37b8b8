"""Nemotron-3-Nano 4B as a two-tower: the published recipe (arXiv 2606.26493), scaled down to what one machine trains.

    python launch/train.py --config=configs/nano4b.py:h200 --workdir=DIR --config.data=TEXT --config.init_from=BACKBONE

BACKBONE is a folder with nvidia/NVIDIA-Nemotron-3-Nano-4B-Base-BF16, as published, as transformers saves it, or
converted. What stands after the colon is the hardware, which decides mesh, batch and accumulation, and nothing else:

    h200        one NVIDIA H200
    h100        one NVIDIA H100 of 80 GB; moments in bfloat16
    v5e-8       eight TPU v5e (16 GiB each): one sequence over all of them; moments in bfloat16
    v6e-8       eight TPU v6e (32 GiB each)
    v5p-64      64 TPU v5p

Without it the mesh is a share of the batch and of every matrix for each device there is.

3,973,556,832 parameters per tower; the denoiser's and its time conditioning train. docs/guide/scale.md and
docs/reports/nano4b.md say what that takes.
"""

from ml_collections import ConfigDict

from twotower_jax.train.config import base_config

# The mesh, parts of the batch, and the dtype of the moments. Parts are of one sequence a device: activations of 8192
# tokens through 84 layers are what a device of 32 to 80 GB has room for. fsdp 8 keeps every matrix in whole tiles of
# rows: 3136 and 12544 are multiples of 8 × 8. A device of 16 GiB has room for a quarter of a sequence and half of a
# vocabulary: what a layer computes is an eighth then, and what is kept of each a quarter.
_HARDWARE = {
    "": ({"fsdp": -1}, 1, "float32"),
    "h200": ({}, 64, "float32"),
    "h100": ({}, 64, "bfloat16"),
    "v5e-8": ({"sequence": 4, "tensor": 2}, 64, "bfloat16"),
    "v6e-8": ({"fsdp": 8, "data": -1}, 8, "float32"),
    "v5p-64": ({"fsdp": 8, "data": -1}, 1, "float32"),
}


def get_config(hardware: str = "") -> ConfigDict:
    if hardware not in _HARDWARE:
        raise ValueError(f"configs/nano4b.py:{hardware}: there are {', '.join(filter(None, _HARDWARE))}")
    config = base_config(
        model={
            "hidden_size": 3136,
            "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
            "mamba_num_heads": 96,
            "mamba_head_dim": 80,
            "ssm_state_size": 128,
            "n_groups": 8,
            "chunk_size": 256,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12544,
        }
    )
    config.objective = "denoiser"
    config.vocab_size = 131072
    # As published: what a block sees before it is what the backbone was trained to read.
    config.sequence_length = 8192
    # A quarter of the 30B's 256 sequences, as the parameters that compute for a token are about the same and the run is
    # a hundredth to a thousandth of the tokens: half a million tokens a step leave 20,000 steps for 10 B tokens.
    config.batch_size = 64
    config.steps = 20_000
    # The paper's rates. The batch is a quarter, but so short a run has no time for a slower one.
    config.learning_rate = 1e-4
    config.final_learning_rate = 1e-6
    config.dtype = "bfloat16"
    config.remat = "layer"
    mesh, config.accumulate, config.moments_dtype = _HARDWARE[hardware]
    config.mesh.update(mesh)
    config.validation_every = 1_000
    # 29.3 GFLOP a token: at half the peak of an H200 a step takes 31 s, and these 104 minutes.
    config.checkpoint_every = 200
    return config
