"""A stack of layers of any pattern: repeated stretches of it are stacked and scanned.

Tracing and compiling then cost what the distinct layers cost, not what the depth does. `PerLayer` holds something for
each layer and hides which layers are stacked. Every pass over layers, of one tower or of two side by side, is a `walk`
with a step that says what happens to one layer. Only this file knows of stacking.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from twotower_jax import sharding
from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.layer import Layer
from twotower_jax.layers import registry
from twotower_jax.parameters import Scope


@dataclasses.dataclass(frozen=True)
class Stretch:
    """`repeats` times the layers `unit`, from layer `start` on."""

    unit: str
    repeats: int
    start: int

    @property
    def stacked(self) -> bool:
        """Whether what belongs to its layers has a leading axis over the repeats."""
        return self.repeats > 1


Stretches = tuple[Stretch, ...]


def segments(pattern: str, scan_layers: bool = True) -> Stretches:
    """Splits a layer pattern into repeated units with as few distinct layers as possible, then as few units.

    >>> [(s.unit, s.repeats) for s in segments("MEMEM*EMEMEM*EME")]
    [('ME', 1), ('MEM*EME', 2)]
    """
    if not scan_layers:
        return tuple(Stretch(letter, 1, i) for i, letter in enumerate(pattern))

    @functools.cache
    def best(start: int) -> tuple[int, int, Stretches]:
        if start == len(pattern):
            return 0, 0, ()
        options = []
        for width in range(1, len(pattern) - start + 1):
            unit = pattern[start : start + width]
            repeats = 1
            while True:
                bodies, units, rest = best(start + width * repeats)
                options.append((bodies + width, units + 1, (Stretch(unit, repeats, start), *rest)))
                if not pattern.startswith(unit, start + width * repeats):
                    break
                repeats += 1
        return min(options, key=lambda option: option[:2])

    # Filled from the right, so that a deep pattern does not recurse deeply.
    for start in reversed(range(len(pattern))):
        best(start)
    return best(0)[2]


@flax.struct.dataclass
class PerLayer:
    """Something for each layer: a tree of arrays, or None for nothing.

    Attributes:
      segments: for each stretch a tuple over the layers of its unit, whose arrays have a leading axis over the repeats
        where the stretch is stacked.
      stretches: those of the layers.
    """

    segments: tuple[tuple[Any, ...], ...]
    stretches: Stretches = flax.struct.field(pytree_node=False)

    @classmethod
    def nothing(cls, stretches: Stretches) -> "PerLayer":
        """None for each layer."""
        return cls(tuple((None,) * len(s.unit) for s in stretches), stretches)

    @classmethod
    def zeros(cls, stretches: Stretches, shapes: Callable[[str], Any]) -> "PerLayer":
        """Zeros of the shapes and dtypes that `shapes(letter)` gives for a layer, a tree of `jax.ShapeDtypeStruct`."""

        def one(letter, s):
            leading = (s.repeats,) if s.stacked else ()
            return jax.tree.map(lambda v: jnp.zeros((*leading, *v.shape), v.dtype), shapes(letter))

        return cls(tuple(tuple(one(letter, s) for letter in s.unit) for s in stretches), stretches)

    @classmethod
    def axes(cls, stretches: Stretches, axes: Callable[[str], Any]) -> "PerLayer":
        """The logical axes of such arrays, of those that `axes(letter)` gives for a layer."""

        def one(letter, s):
            leading = ("layers",) if s.stacked else ()
            return jax.tree.map(lambda v: (*leading, *v), axes(letter), is_leaf=sharding.is_axes)

        return cls(tuple(tuple(one(letter, s) for letter in s.unit) for s in stretches), stretches)

    @classmethod
    def unstack(cls, stretches: Stretches, stacked: jax.Array) -> "PerLayer":
        """An array with a leading axis over all layers, as one entry per layer."""
        out = []
        for s in stretches:
            width = len(s.unit)
            part = stacked[s.start : s.start + width * s.repeats]
            part = part.reshape(s.repeats, width, *stacked.shape[1:])
            out.append(tuple(part[:, j] if s.stacked else part[0, j] for j in range(width)))
        return cls(tuple(out), stretches)

    def stack(self) -> jax.Array | None:
        """The arrays, all of one shape, that some layers have, as one array in the layers' order: (layers that have
        one, …). None for none."""
        rows = []
        for s, segment in zip(self.stretches, self.segments, strict=True):
            arrays = [array for array in segment if array is not None]
            if arrays:
                shape = arrays[0].shape[1:] if s.stacked else arrays[0].shape
                rows.append(jnp.stack(arrays, axis=int(s.stacked)).reshape(-1, *shape))
        return jnp.concatenate(rows) if rows else None

    def by_layer(self) -> list[Any]:
        """One entry per layer, in order."""
        out = []
        for s, segment in zip(self.stretches, self.segments, strict=True):
            for r in range(s.repeats):
                for layer in segment:
                    out.append(jax.tree.map(lambda v, r=r: v[r], layer) if s.stacked else layer)
        return out

    def zip(self, *others: "PerLayer") -> "PerLayer":
        """Several entries per layer as one tuple per layer."""
        pairs = zip(self.segments, *(other.segments for other in others), strict=True)
        return self.replace(segments=tuple(tuple(zip(*segment, strict=True)) for segment in pairs))

    def map(
        self, function: Callable[..., Any], *others: "PerLayer", given: Sequence[Sequence[Any]] | None = None
    ) -> "PerLayer":
        """`function(entry, …)` of one layer's entries; nothing of nothing.

        Args:
          given: for each stretch something for each layer of its unit, which `function` then takes first.
        """

        def one(s, j, entries):
            if entries[0] is None:
                return None
            of_layer = function if given is None else functools.partial(function, given[j[0]][j[1]])
            return (jax.vmap(of_layer) if s.stacked else of_layer)(*entries)

        out = [
            tuple(one(s, (i, j), entries) for j, entries in enumerate(segment))
            for i, (s, segment) in enumerate(zip(self.stretches, self.zip(*others).segments, strict=True))
        ]
        return self.replace(segments=tuple(out))

    def take_rows(self, rows: Int[Array, " R"]) -> "PerLayer":
        """The rows (R,) int32 of a batch; an index out of range gives the last one."""
        return self._by_rows(functools.partial(take_rows, rows))

    def put_rows(self, rows: Int[Array, " R"], part: "PerLayer") -> "PerLayer":
        """With the rows (R,) int32, all different, replaced by those of `part`; none for one out of range."""
        return self._by_rows(functools.partial(put_rows, rows), part)

    def clear_rows(self, cleared: Bool[Array, " B"]) -> "PerLayer":
        """With zeros in the rows of `cleared` (B,) bool."""
        return self._by_rows(functools.partial(clear_rows, cleared))

    def _by_rows(self, function, *others):
        """`function(axis of the rows, array, …)` of each array."""
        segments = [
            jax.tree.map(functools.partial(function, int(s.stacked)), *parts)
            for s, *parts in zip(self.stretches, self.segments, *(other.segments for other in others), strict=True)
        ]
        return self.replace(segments=tuple(segments))


# Rows of an array whose axis number `axis` is the batch.


def take_rows(rows: jax.Array, axis: int, v: jax.Array) -> jax.Array:
    return jnp.take(v, rows, axis=axis, mode="clip")


def put_rows(rows: jax.Array, axis: int, v: jax.Array, new: jax.Array) -> jax.Array:
    return v.at[(slice(None),) * axis + (rows,)].set(new, mode="drop", unique_indices=True)


def clear_rows(cleared: jax.Array, axis: int, v: jax.Array) -> jax.Array:
    shape = (1,) * axis + (-1,) + (1,) * (v.ndim - axis - 1)
    return jnp.where(cleared.reshape(shape), jnp.zeros_like(v), v)


class Segment(nnx.Module):
    """The layers of one `Stretch`, their parameters stacked over the repeats."""

    def __init__(self, config: ModelConfig, stretch: Stretch, prefix: str, execution: Execution, bidirectional: bool):
        self.stretch = stretch
        width, repeats = len(stretch.unit), stretch.repeats
        for j, letter in enumerate(stretch.unit):
            prefixes = tuple(f"{prefix}layers.{stretch.start + r * width + j}." for r in range(repeats))
            layer = Layer(config, letter, Scope(prefixes, stacked=stretch.stacked), execution, bidirectional)
            setattr(self, f"layer_{j}", layer)

    @property
    def layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{j}") for j in range(len(self.stretch.unit))]


class Stacked(Protocol):
    """Who has layers to walk down: a tower."""

    execution: Execution
    stretches: Stretches

    @property
    def segments(self) -> list[Segment]: ...


def walk[Carry](
    towers: Sequence[Stacked],
    carry: Carry,
    step: Callable[[tuple[Layer, ...], Carry, Any], tuple[Carry, Any]],
    inputs: PerLayer | None = None,
) -> tuple[Carry, PerLayer]:
    """Goes down the layers of one tower, or of several side by side.

    Args:
      towers: of the same pattern.
      carry: what passes from layer to layer.
      step: `(layers, carry, input) → (carry, output)`, with one layer of each tower at the same depth.
      inputs: one for each layer, or None.

    Returns:
      the last carry and the output of each layer.
    """
    remat, stretches = towers[0].execution.remat, towers[0].stretches
    inputs = PerLayer.nothing(stretches) if inputs is None else inputs
    outputs, alike = [], []
    # Outside of a trace nothing is gained, and everybody can look at what a layer gets.
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(carry))
    repeated = Counter(stretch.unit for stretch in stretches if traced and not stretch.stacked)
    for i, stretch in enumerate(stretches):
        graphdefs, states = zip(*(nnx.split(tower.segments[i]) for tower in towers), strict=True)

        def unit(carry, unit_inputs, graphdefs=graphdefs, stretch=stretch):
            states, layer_inputs = unit_inputs
            merged = [nnx.merge(*pair).layers for pair in zip(graphdefs, states, strict=True)]
            unit_outputs = []
            for j, layers in enumerate(zip(*merged, strict=True)):
                one_layer = functools.partial(step, layers)
                if remat == "layer":
                    one_layer = _recomputed(one_layer, stretch)
                carry, output = one_layer(carry, layer_inputs[j])
                unit_outputs.append(output)
            return carry, tuple(unit_outputs)

        if remat == "unit":
            unit = _recomputed(unit, stretch)
        unit_inputs = (states, inputs.segments[i])
        if stretch.stacked:
            carry, output = jax.lax.scan(unit, carry, unit_inputs, unroll=towers[0].execution.unroll)
        elif repeated[stretch.unit] > 1:
            # Layers one by one are traced once for each kind: the first of them stands for those that are like it.
            leaves, treedef = jax.tree.flatten(states)
            what = stretch.unit, [_what(*pair) for pair in zip(graphdefs, states, strict=True)]
            known = next((function for other, function in alike if other == what), None)
            if known is None:
                known = jax.jit(functools.partial(_of_leaves, unit, treedef))
                alike.append((what, known))
            carry, output = known(carry, leaves, inputs.segments[i])
        else:
            carry, output = unit(carry, unit_inputs)
        outputs.append(output)
    return carry, PerLayer(tuple(outputs), stretches)


def _of_leaves(unit, treedef, carry, leaves, unit_inputs):
    return unit(carry, (jax.tree.unflatten(treedef, leaves), unit_inputs))


def _what(graphdef, state):
    """What tells a stretch from others of its letters, values of parameters aside: not its place or their names."""
    settings = [attribute for attribute in graphdef.attributes if attribute[0] != "stretch"]
    return settings, jax.tree.structure(nnx.to_pure_dict(state))


def _recomputed(function, stretch):
    kept = {name for letter in stretch.unit for name in registry.kind(letter).kept}
    policy = jax.checkpoint_policies.save_only_these_names(*sorted(kept))
    # In a loop nothing can be merged with the forward pass anyway.
    return jax.checkpoint(function, policy=policy, prevent_cse=not stretch.stacked)
