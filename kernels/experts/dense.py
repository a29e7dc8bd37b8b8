"""Every row through every expert: the plain way, which measurements compare with.

Exact, and may be named like any implementation; nothing chooses it.
"""

from twotower_jax.kernels.experts import reference
from twotower_jax.kernels.numerics.quantized import as_array


def expert_mlp(x, indices, gates, weights, *, activation):
    """`kernels.expert_mlp` with every row through every expert, E / k times the work of the chosen ones."""
    weights = type(weights)(*(None if w is None else as_array(w, x.dtype) for w in weights))
    return reference.expert_mlp_dense(x, indices, gates.astype(x.dtype), weights, activation).astype(x.dtype)
