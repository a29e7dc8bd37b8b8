"""Whether a mesh divides a model and its batches evenly."""

from twotower_jax.config import ModelConfig
from twotower_jax.layers import registry
from twotower_jax.sharding import BATCH, SEQUENCE, TENSOR, MeshShape, check_divides


def check_fits(shape: MeshShape, model: ModelConfig, batch_size: int, sequence_length: int, block_size: int) -> None:
    """Refuses a mesh (resolved) that cannot divide a model and its batches evenly.

    Raises:
      ValueError: naming the axis and what it does not divide.
    """
    check_divides(" × ".join(BATCH), shape.batch_shards, batch_size, "the batch, or the part of it taken at once,")
    check_divides(SEQUENCE, shape.sequence, sequence_length, "sequence_length")
    if shape.sequence > 1:
        check_divides(f"{SEQUENCE} × block_size", shape.sequence * block_size, sequence_length, "sequence_length")
    check_divides(TENSOR, shape.tensor, model.vocab_size, "vocab_size")
    for letter in sorted(set(model.hybrid_override_pattern), key=model.hybrid_override_pattern.index):
        registry.kind(letter).check_mesh(model, shape, sequence_length)
