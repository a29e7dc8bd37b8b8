"""Any objective with an adapter in place of its own parameters: what trains is the adapter, and nothing else.

Losses, examples, terms and noise are the objective's. The table of parameters has the adapter's beside the model's, so
that everything that reads it (start, optimizer, mesh, saving) sees an ordinary run with few trained parameters.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import lora, quantization, randomness
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.lora import Dropout, Lora
from twotower_jax.parameters import Parameter, Params, Path, flatten, initialize, parameter_table, unflatten
from twotower_jax.train.objectives import Documents, Examples, Losses, NoiseKey, Objective

# So that an adapter's keys are no others' of the same seed.
_DRAWN, _DROPPED = 0x10FA, 0xD401


def with_adapter(objective: Objective, settings: Lora) -> "Adapting":
    """The objective with an adapter of those matrices that it would train.

    Raises:
      ValueError: if the patterns name nothing, see `lora.adapter_table`; or if routers' biases are to move.
    """
    if objective.balance.bias_rate:
        raise ValueError(
            f"router_bias_rate={objective.balance.bias_rate} moves biases of the base, which an adapter leaves; "
            "leave it out, or train without lora.rank"
        )
    adapting = Adapting(objective, settings)
    _ = adapting.adapter
    return adapting


@dataclasses.dataclass(frozen=True)
class Adapting:
    """`inner` with its matrices adapted and all of its own parameters frozen. What is not said here is `inner`'s."""

    inner: Objective
    lora: Lora
    losses = Objective.losses

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @functools.cached_property
    def adapter(self) -> dict[Path, Parameter]:
        """The adapter's parameters: of the matrices that the objective trains and the patterns name."""
        trained = {path: p for path, p in parameter_table(self.model).items() if self.inner.is_trained(path)}
        return lora.adapter_table(trained, self.lora.rank, self.lora.patterns)

    @property
    def table(self) -> Mapping[Path, Parameter]:
        """The model's parameters and the adapter's."""
        return parameter_table(self.model) | self.adapter

    def is_trained(self, path: Path) -> bool:
        """Whether it is the adapter's."""
        return path in self.adapter

    def frozen(self, parameter: Parameter) -> jax.ShapeDtypeStruct | Quantized:
        """How a parameter of the base is stored: quantized, or in the dtype of the base."""
        method = self.lora.method
        dtype = jnp.dtype(self.lora.base) if self.lora.base and method is None else self.dtype
        return quantization.abstract(parameter, method, dtype)

    def for_validation(self) -> "Adapting":
        """The objective's, without dropout."""
        return Adapting(self.inner.for_validation(), dataclasses.replace(self.lora, dropout=0.0))

    def examples(
        self,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
    ) -> Examples:
        """The objective's, and with dropout a key for each row, of seed, step and the row's number."""
        examples = self.inner.examples(ids, counted, noise, block_size, documents)
        if not self.lora.dropout:
            return examples
        step_key = jax.random.fold_in(jax.random.fold_in(randomness.key(noise.seed), _DROPPED), noise.step)
        # A row that is seen under several masks has a key for each.
        passes = len(examples.clean) // len(ids)
        rows = jnp.repeat(noise.index, passes) * passes + jnp.tile(jnp.arange(passes, dtype=jnp.int32), len(ids))
        keys = jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(step_key, row)))(rows)
        return examples._replace(dropout=keys)

    def losses_of(self, params: Params, examples: Examples, block_size: int, validating: bool = False) -> Losses:
        """The objective's, of the model with the adapter beside its matrices."""
        keys = examples.dropout
        dropout = None if keys is None else Dropout(self.lora.dropout, keys, self.adapter)
        adapted = self.model_params(params, dropout)
        return self.inner.losses_of(adapted, examples._replace(dropout=None), block_size, validating)

    def model_params(self, params: Params, dropout: Dropout | None = None) -> Params:
        """Parameters for the model alone, of those of the table: adapted matrices are `Adapted` values."""
        adapter, base = lora.split(params)
        return lora.attach(base, adapter, self.lora.scale, dropout)

    def start(self, checkpoint: Params | None, key: jax.Array) -> Params:
        """The objective's parameters and a fresh adapter, which changes nothing."""
        fresh = initialize(self.adapter, jax.random.fold_in(key, _DRAWN))
        return unflatten(flatten(self.inner.start(checkpoint, key)) | flatten(fresh))
