"""Buffers that the design rules out, looked for in a compiled program.

A program is HLO as text, one device's part of it. Three things must not be in it: a state for every block, a product
of all rows with all experts, and a weight that is copied before it is used, because it lies in memory in another order
than the product wants, or because it is cut out of a stack of layers.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from twotower_jax.config import ModelConfig
from twotower_jax.parameters import Parameter
from twotower_jax.sharding import MeshShape, spec
from twotower_jax.train.config import TrainConfig

STATES, DENSE, WEIGHT_COPIES = "a state for every block", "a dense expansion over the experts", "a copy of a weight"
# Weights that count, in elements.
_LARGE = 1 << 20
# Instructions that move elements and compute nothing, among them those that take a part, and those that move nothing.
_MOVES = ("copy", "transpose", "pad", "slice", "dynamic-slice", "concatenate", "reverse", "gather")
_CUTS = ("slice", "dynamic-slice")
_STANDS = ("parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element", "iota")
_PRODUCTS = ("dot", "convolution")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w\-]+)\((?:%([\w.\-]+))?"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")


class Gate(NamedTuple):
    """A buffer that must not exist: its name, and the shapes found that would be it."""

    name: str
    found: list[str]


def describe(gates: Iterable[Gate]) -> list[str]:
    """A line for each."""
    return [f"  {gate.name}: {', '.join(gate.found) or 'none'}" for gate in gates]


class _Instruction(NamedTuple):
    """One output of an instruction: `dims` without those of size 1; `called` is a fusion's computation, `operand` the
    first one's name."""

    name: str
    shape: str
    dims: tuple[int, ...]
    opcode: str
    operand: str | None
    called: str | None


def per_block_states(program: str, config: TrainConfig, model: ModelConfig, block_size: int, sizes: MeshShape) -> Gate:
    """A state (P, N) for every block and head. Chunks may have one each, if they are longer than blocks."""
    head_dim, states = model.mamba_head_dim, model.ssm_state_size
    heads = model.mamba_num_heads // sizes.tensor
    least = _tokens(config, sizes) // block_size * heads * head_dim * states
    found = []
    if model.chunk_size > block_size:
        for shape, dims in _shapes(program):
            if math.prod(dims) >= least and sorted(dims[-2:]) == sorted((head_dim, states)):
                found.append(shape)
    return Gate(STATES, found)


def dense_experts(program: str, config: TrainConfig, model: ModelConfig, sizes: MeshShape) -> Gate:
    """Rows times experts times their width."""
    experts, width = model.n_routed_experts // sizes.expert, model.moe_intermediate_size // sizes.tensor
    least = _tokens(config, sizes) * experts * width
    found = []
    if experts > 1:
        for shape, dims in _shapes(program):
            expanded = dims[-1] == experts * width or sorted(dims[-2:]) == sorted((experts, width))
            if expanded and math.prod(dims) >= least:
                found.append(shape)
    return Gate(DENSE, found)


def weight_copies(program: str, table: Iterable[Parameter], sizes: Mapping[str, int], least: int = _LARGE) -> Gate:
    """Weights, as they are used on a device or as they lie there, moved by an instruction that computes nothing.

    Cutting the part of one layer that lies on a device out of its stack does not count where weights are gathered
    afterwards, which moves more; nor does a cast, nor what a fusion does on the way to a product. A gradient that is
    turned around counts as its weight does, but not one that is cut out of a product: XLA multiplies for several
    weights at once, and what it cuts was made a moment ago and lies as it is wanted.

    Args:
      table: the parameters. sizes: devices along each axis of the mesh.
      least: weights of fewer elements do not count.
    """
    used, at_rest = set(), set()
    for parameter in table:
        if len(parameter.shape) - parameter.axes.count("layers") < 2:
            continue
        for stored, kind in ((False, used), (True, at_rest)):
            parts = spec(parameter.axes, parameter.shape, sizes, stored=stored)
            shape = [_share(size, part, sizes) for size, part in zip(parameter.shape, parts, strict=True)]
            layers = parameter.axes.count("layers")
            if math.prod(shape[layers:]) >= least:
                kind |= {_matrix(shape[layers:]), _matrix(shape)}
    bodies = dict(_computations(program))
    fused = {instruction.called for body in bodies.values() for instruction in body}
    found = []
    for instruction, beside in ((one, body) for name, body in bodies.items() if name not in fused for one in body):
        moved = _moved(instruction, bodies)
        matrix = tuple(sorted(instruction.dims))
        if matrix in used and set(moved) <= set(_CUTS) and _is_product(instruction.operand, beside, bodies):
            continue
        if moved and (matrix in used or "pad" in moved and any(_is_padded(matrix, shape) for shape in used)):
            found.append(f"{instruction.shape} by {moved[0]}")
        elif matrix in at_rest and {"copy", "transpose"} & set(moved):
            found.append(f"{instruction.shape} at rest by {moved[0]}")
    return Gate(WEIGHT_COPIES, [f"{found.count(one)} × {one}" for one in sorted(set(found))])


def _tokens(config: TrainConfig, sizes: MeshShape) -> int:
    """Of one device, in the part of the batch that is taken at once."""
    return config.batch_size // config.accumulate // sizes.batch_shards * config.sequence_length // sizes.sequence


def _share(size: int, part: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    axes = (part,) if isinstance(part, str) else part or ()
    return size // math.prod(sizes[axis] for axis in axes)


def _matrix(shape: list[int]) -> tuple[int, ...]:
    """In whatever order it lies."""
    return tuple(sorted(size for size in shape if size > 1))


def _is_padded(matrix: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Up to the next multiple of 128, which is as far as a tile can ask for."""
    pairs = list(zip(matrix, shape, strict=False))
    return len(matrix) == len(shape) and all(size <= wide <= -(-size // 128) * 128 for wide, size in pairs)


def _shapes(program: str) -> Iterator[tuple[str, list[int]]]:
    for shape in sorted(set(re.findall(r"(?:f32|bf16)\[[\d,]+\]", program))):
        yield shape, [int(n) for n in shape[shape.index("[") + 1 : -1].split(",")]


def _computations(program: str) -> Iterator[tuple[str, list[_Instruction]]]:
    name, body = "", []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name, body = match[1], []
        elif match := _INSTRUCTION.match(line):
            called = _CALLED.search(line)
            for dtype, sizes in _SHAPE.findall(match[2]):
                dims = tuple(int(n) for n in sizes.split(",") if n and n != "1")
                shape, called_name = f"{dtype}[{sizes}]", called[1] if called else None
                body.append(_Instruction(match[1], shape, dims, match[3], match[4], called_name))
        elif line.startswith("}"):
            yield name, body


def _moved(instruction: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> list[str]:
    """The moves that an instruction is made of; none if it also computes."""
    if instruction.opcode != "fusion":
        return [instruction.opcode] if instruction.opcode in _MOVES else []
    # What is computed of single numbers is where a slice begins.
    inside = [one.opcode for one in bodies.get(instruction.called, ()) if one.dims]
    return [op for op in inside if op in _MOVES] if all(op in (*_MOVES, *_STANDS) for op in inside) else []


def _is_product(name: str | None, body: list[_Instruction], bodies: Mapping[str, list[_Instruction]]) -> bool:
    """Whether what has this name in a computation is made by a product, in a fusion or by itself."""
    made = [one for one in body if one.name == name]
    inside = [one for outer in made for one in (outer, *bodies.get(outer.called, ()))]
    return any(one.opcode in _PRODUCTS for one in inside)
