"""How much arithmetic a training step is, whatever code runs it: multiplications and additions of the model's products.

Counted for one token of a sequence of L, two operations a multiply-add; norms, activations, gates and softmax are left
out, and so is what a program computes twice (rematerialization) or in another form (a scan in chunks). With the
alphabet of the layers (D model, H heads of P with states N in G groups, W convolution width, F width of an MLP or
expert, k of E experts a token, S block, V vocabulary):

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
"""

from collections.abc import Sequence

import jax

from twotower_jax.config import ModelConfig
from twotower_jax.layers import registry
from twotower_jax.layers.time_conditioning import NUM_SINUSOIDS
from twotower_jax.train.config import TrainConfig

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


def tower_flops(model: ModelConfig, keys: float, scans: int = 1) -> float:
    """Forward, of one token in all layers, without embedding and head.

    Args:
      keys: that a query sees on average.
      scans: 2 where the denoiser also reads every block backward.
    """
    return sum(registry.kind(letter).flops(model, keys, scans) for letter in model.hybrid_override_pattern)


def step_flops(config: TrainConfig, model: ModelConfig, block_size: int) -> float:
    """The FLOPs of one step over the whole batch."""
    length = config.sequence_length
    scans = 2 if config.two_towers and config.variant.bidirectional_mamba else 1
    return _step_flops(config, model, ((length + 1) / 2, (length + block_size) / 2), (1, scans))


def _step_flops(config: TrainConfig, model: ModelConfig, keys: tuple[float, float], scans: tuple[int, int]) -> float:
    """With the keys that a query sees and the scans of a layer, in a causal tower and in the denoiser."""
    length, trained, frozen = config.sequence_length, 3, 1
    causal = tower_flops(model, keys[0], scans[0])
    head = 2 * model.hidden_size * model.vocab_size
    if not config.two_towers:
        per_token, per_sequence = trained * (causal + head), 0
    else:
        variant = config.variant
        denoiser = tower_flops(model, keys[1], scans[1])
        context = (frozen if variant.context == "frozen" else trained) * causal
        per_token = context + trained * (denoiser + (2 if variant.context_loss else 1) * head)
        width = model.hidden_size
        per_sequence = trained * 2 * (NUM_SINUSOIDS * width + 4 * width**2) if variant.time_conditioning else 0
    passes = config.diffusion.process.passes if config.two_towers else 1
    return passes * config.batch_size * (length * per_token + per_sequence)


def step_kernel_flops(config: TrainConfig, model: ModelConfig, block_size: int) -> float:
    """Of `step_flops`, what is no product with weights: scans, convolutions, and attention's scores and sums."""
    return step_flops(config, model, block_size) - _step_flops(config, model, (0, 0), (0, 0))


def peak_flops(config: TrainConfig, devices: Sequence[jax.Device]) -> float | None:
    """The peak of all devices of the run, in FLOP/s; None where it is neither given nor known."""
    kind = devices[0].device_kind
    known = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    peak = config.peak_flops or (known[0] if known else 0.0)
    return peak * len(devices) or None
