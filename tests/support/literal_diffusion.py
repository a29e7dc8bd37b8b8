"""Formulas of diffusion written out in float64, and what its tests share: a small vocabulary with a mask token."""

import numpy as np
from hypothesis import strategies as st

MASK = 3
VOCAB = 13

seeds = st.integers(0, 2**32 - 1)

LITERAL_MASK_PROBABILITY = {
    "linear": lambda t: t,
    "cosine": lambda t: 1 - np.cos(np.pi * t / 2),
    "exponential": lambda t: 1 - (np.exp(-3 * t) - np.exp(-3)) / (1 - np.exp(-3)),
}


def literal_log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def literal_filter(logits, top_k, top_p):
    """Keeps tokens one by one, most probable first."""
    order = np.argsort(-logits, kind="stable")
    order = order[:top_k] if top_k else order
    probabilities = np.exp(logits[order] - logits[order].max())
    probabilities /= probabilities.sum()
    kept, mass = [], 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probability
    return set(kept)
