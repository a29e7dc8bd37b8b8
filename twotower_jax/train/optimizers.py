"""Optimizers by name, and an average of the weights beside them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from twotower_jax.parameters import LINEAR, Parameter, Params, Path, unflatten
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.schedule import learning_rate

Table = Mapping[Path, Parameter]

# The root mean square of an orthogonalized update, as AdamW's is near it: one learning rate serves both (Liu et al.
# 2025, arXiv 2502.16982, section 2.2).
_UPDATE_RMS = 0.2


def adamw(config: TrainConfig, trained: Table) -> optax.GradientTransformation:
    """AdamW; weight decay where the table says so."""
    beta1, beta2 = config.adam_betas
    return optax.adamw(
        learning_rate(config),
        b1=beta1,
        b2=beta2,
        weight_decay=config.weight_decay,
        mask=unflatten({path: parameter.decay for path, parameter in trained.items()}),
    )


def muon(config: TrainConfig, trained: Table) -> optax.GradientTransformation:
    """Muon for the matrices between embedding and head, one by one where they are stacked; AdamW for all others."""
    matrices = {path for path, parameter in trained.items() if is_hidden_matrix(parameter)}
    rows, columns = -2, -1

    def each(params: Params, value: Any) -> Params:
        return jax.tree.map(lambda _: value, params)

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: trained[tuple(key.key for key in path)].decay, params)

    beta1, beta2 = config.adam_betas
    by_name = {
        "muon": optax.contrib.muon(
            learning_rate(config),
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda p: each(p, optax.contrib.MuonDimensionNumbers(rows, columns)),
            consistent_rms=_UPDATE_RMS,
        ),
        "adamw": optax.adamw(learning_rate(config), b1=beta1, b2=beta2, weight_decay=config.weight_decay, mask=decays),
    }
    return optax.partition(by_name, unflatten({path: "muon" if path in matrices else "adamw" for path in trained}))


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether it multiplies hidden states and gives hidden states."""
    return parameter.layout == LINEAR and parameter.decay and "vocab" not in parameter.axes


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class Averaged(NamedTuple):
    """An optimizer's state, and beside it the average of the parameters, float32, after `count` updates."""

    inner: Any
    average: Params
    count: jax.Array


def averaged(decay: float, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that keeps an exponential moving average of the parameters.

    After n updates the average takes 1 − min(decay, (1 + n) / (10 + n)) of the new ones, so that the first parameters
    are soon forgotten.
    """

    def init(params: Params) -> Averaged:
        return Averaged(inner.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Averaged, params: Params | None = None) -> tuple[Params, Averaged]:
        updates, inner_state = inner.update(updates, state.inner, params)
        kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + (1 - kept) * (p - a), state.average, new)
        return updates, Averaged(inner_state, average, state.count + 1)

    return optax.GradientTransformation(init, update)
