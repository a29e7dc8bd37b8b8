"""How much arithmetic a training step is, whatever code runs it: multiplications and additions of the model's products.

Counted for one token of a sequence of L, two operations a multiply-add; norms, activations, gates and softmax are left
out, and so is what a program computes twice (rematerialization) or in another form (a scan in chunks). With the
alphabet of the layers (D model, H heads of P with states N in G groups, W convolution width, F width of an MLP or
expert, k of E experts per token, S block, V vocabulary):

    Mamba-2     2 D (2 H P + 2 G N + H) + 2 W (H P + 2 G N) + 4 H P N + 2 H P D
                in_proj, convolution, recurrence (state += x Bᵀ, y = state C), out_proj
    attention   2 D d (2 H + 2 K) + 4 H d · keys            q, o, k, v with K key heads of d; scores and their sum
                keys: (L + 1) / 2 on average where causal, (L + S) / 2 for a denoiser that sees the blocks before its
                own and all of its own
    experts     2 D E + 4 Z F k + 4 D F_shared, where Z is D, or with latent experts their width, and 4 D Z more
    MLP         4 D F
    head        2 D V
    time        2 (256 D + D² + 3 D²) a sequence

A trained part counts three times, once forward and twice backward (by its input and by its weights), a frozen one once.
Under an adapter what would train counts twice, as its weights have no gradient, and the adapter itself three times 2 R
(in + out) for each of its matrices.
"""

from collections.abc import Sequence

import jax

from twotower_jax.config import ModelConfig
from twotower_jax.layers import registry
from twotower_jax.layers.time_conditioning import NUM_SINUSOIDS
from twotower_jax.parameters import count
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import tables

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by the start of its kind; from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def tower_flops(model: ModelConfig, keys: float, scans: int = 1, in_kernels: bool = False) -> float:
    """Forward, of one token in all layers, without embedding and head.

    Args:
      keys: that a query sees on average.
      scans: 2 where the denoiser also reads every block backward.
      in_kernels: only what kernels compute of it, where there are any.
    """
    kinds = map(registry.kind, model.hybrid_override_pattern)
    return sum((kind.kernel_flops if in_kernels else kind.flops)(model, keys, scans) for kind in kinds)


def step_flops(config: TrainConfig, model: ModelConfig, block_size: int, in_kernels: bool = False) -> float:
    """The FLOPs of one step over the whole batch; only those of kernels if `in_kernels`."""
    length, trained, frozen = config.sequence_length, 2 if config.lora.rank else 3, 1
    causal = tower_flops(model, (length + 1) / 2, in_kernels=in_kernels)
    head = 0 if in_kernels else 2 * model.hidden_size * model.vocab_size
    if not config.two_towers:
        per_token, per_sequence = trained * (causal + head), 0
    else:
        variant = config.variant
        scans = 2 if variant.bidirectional_mamba else 1
        denoiser = tower_flops(model, (length + block_size) / 2, scans, in_kernels)
        context = (frozen if variant.context == "frozen" else trained) * causal
        # Distillation reads the context's head; with a context loss that is read anyway.
        taught = 0 if variant.context_loss or not config.distillation.weight else head
        per_token = context + trained * (denoiser + (2 if variant.context_loss else 1) * head) + frozen * taught
        width, conditioned = model.hidden_size, variant.time_conditioning and not in_kernels
        per_sequence = trained * 2 * (NUM_SINUSOIDS * width + 4 * width**2) if conditioned else 0
    if config.lora.rank and not in_kernels:
        adapter = tables(make_objective(config, model))[0]
        per_token += 3 * 2 * count(adapter)
    passes = config.diffusion.process.passes if config.two_towers else 1
    return passes * config.batch_size * (length * per_token + per_sequence)


def peak_flops(config: TrainConfig, devices: Sequence[jax.Device]) -> float | None:
    """The peak of all devices of the run, in FLOP/s; None where it is neither given nor known."""
    kind = devices[0].device_kind
    known = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    peak = config.peak_flops or (known[0] if known else 0.0)
    return peak * len(devices) or None
