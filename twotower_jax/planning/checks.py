"""Buffers that the design rules out, looked for in a compiled program.

A program is HLO as text, one device's part of it. Three things must not be in it: a state for every block, a product
of all rows with all experts, and a weight that is copied before it is used, because it lies in memory in another order
than the product wants, or because it is cut out of a stack of layers. One such copy nobody can help, and is measured
instead: of arguments into other tiles, once a call (`retiled_bytes`).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from twotower_jax.config import ModelConfig
from twotower_jax.parameters import Parameter
from twotower_jax.planning.predict import is_ragged
from twotower_jax.sharding import MeshShape, spec
from twotower_jax.train.config import TrainConfig

STATES, DENSE, WEIGHT_COPIES = "a state for every block", "a dense expansion over the experts", "a copy of a weight"
_BYTES = {"bf16": 2, "f32": 4}
# Weights that count, in elements.
_LARGE = 1 << 20
# The rows that an exchange among the experts' devices has room for, of one even share (layers/expert_parallel.py).
_ROOM = 1.5
# Instructions that move elements and compute nothing, among them those that take a part, and those that move nothing.
_MOVES = ("copy", "transpose", "pad", "slice", "dynamic-slice", "concatenate", "reverse", "gather")
_CUTS = ("slice", "dynamic-slice")
_STANDS = ("parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element", "iota")
_PRODUCTS = ("dot", "convolution")
# What stands between an argument and the copy of it: a copy into faster memory as it lies, of all at once or by parts.
_PREFETCHES = ("bitcast", "copy-start", "copy-done", "slice-start", "slice-done")
_GATHERS = ("all-gather", "all-gather-start", "all-gather-done")
_PARTS_TOGETHER = 'custom_call_target="ConcatBitcast"'
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+) \(", re.MULTILINE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w\-]+)\((?:%([\w.\-]+))?"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED, _BODY = re.compile(r"calls=%?([\w.\-]+)"), re.compile(r"body=%?([\w.\-]+)")
_CALLS = re.compile(r"call(?:-start)?\(.*(?:to_apply=|called_computations=\{)%?([\w.\-]+)")
_SECOND = re.compile(r"call-update\(%[\w.\-]+, %([\w.\-]+)")
_INDEX = re.compile(r", index=(\d+)")


class Check(NamedTuple):
    """A buffer that must not exist: its name, and the shapes found that would be it."""

    name: str
    found: list[str]


def describe(checks: Iterable[Check]) -> list[str]:
    """A line for each."""
    return [f"  {check.name}: {', '.join(check.found) or 'none'}" for check in checks]


class _Instruction(NamedTuple):
    """One output of an instruction: `dims` without those of size 1, `layout` as XLA writes it; `operand` is the first
    one's name, `called` a fusion's computation, `line` all of it."""

    name: str
    shape: str
    dims: tuple[int, ...]
    layout: str
    opcode: str
    operand: str | None
    called: str | None
    line: str

    @property
    def order(self) -> str:
        """All dimensions, from minor to major."""
        return self.layout.partition(":")[0]

    @property
    def in_memory(self) -> str:
        """Order and tiles, whatever memory it is in."""
        return re.sub(r":?S\(\d+\)$", "", self.layout)


def per_block_states(program: str, config: TrainConfig, model: ModelConfig, block_size: int, sizes: MeshShape) -> Check:
    """A state (P, N) for every block and head. Chunks may have one each, if they are longer than blocks."""
    head_dim, states = model.mamba_head_dim, model.ssm_state_size
    heads = model.mamba_num_heads // sizes.tensor
    least = _tokens(config, sizes) // block_size * heads * head_dim * states
    found = []
    if model.chunk_size > block_size:
        for shape, dims in _shapes(program):
            if math.prod(dims) >= least and sorted(dims[-2:]) == sorted((head_dim, states)):
                found.append(shape)
    return Check(STATES, found)


def dense_experts(program: str, config: TrainConfig, model: ModelConfig, sizes: MeshShape) -> Check:
    """Rows times experts times their width; or a product that multiplies all experts with all rows.

    Such a product need not be a buffer of its own, where what it gives is masked and summed in the same fusion. It is
    one from twice the rows that an exchange among devices has room for; but it is none where it only stands there and
    the loop leaves out what is masked (`predict.is_ragged`).
    """
    experts, width = model.n_routed_experts // sizes.expert, model.moe_intermediate_size // sizes.tensor
    tokens = _tokens(config, sizes)
    found = []
    if experts > 1:
        for shape, dims in _shapes(program):
            expanded = dims[-1] == experts * width or sorted(dims[-2:]) == sorted((experts, width))
            if expanded and math.prod(dims) >= tokens * experts * width:
                found.append(shape)
        sides = {width, model.expert_input_size}
        most = 2 * _ROOM * tokens * model.num_experts_per_tok
        found += sorted({one.shape for one in _in_products(program) if _rows_of_all(one.dims, experts, sides) >= most})
    return Check(DENSE, found)


def weight_copies(program: str, table: Iterable[Parameter], sizes: Mapping[str, int], least: int = _LARGE) -> Check:
    """Weights, as they are used on a device or as they lie there, moved by an instruction that computes nothing.

    Cutting the part of one layer that lies on a device out of its stack does not count where weights are gathered
    afterwards, which moves more; nor does a cast, nor what a fusion does on the way to a product. A gradient that is
    turned around counts as its weight does, but not one that is cut out of a product: XLA multiplies for several
    weights at once, and what it cuts was made a moment ago and lies as it is wanted. Nor does what was computed and is
    kept twice, as it lies: the zeros from which the gradients of several layers are summed, and a sum on its way from
    one loop into the next. Nor do arguments count that are only put into other tiles (`retiled_bytes`).

    Args:
      table: the parameters. sizes: devices along each axis of the mesh.
      least: weights of fewer elements do not count.
    """
    found = [what for what, _, is_retiled in _copies(program, table, sizes, least) if not is_retiled]
    return Check(WEIGHT_COPIES, [f"{found.count(one)} × {one}" for one in sorted(set(found))])


def retiled_bytes(program: str, table: Iterable[Parameter], sizes: Mapping[str, int], least: int = _LARGE) -> int:
    """Bytes of weights that are copied, once a call, from the tiles in which arguments come into those within.

    XLA takes arguments on TPUs in tiles of 8 rows, and on tpu7x has 16 within. It changes nothing to leave their layout
    to XLA (`Layout.AUTO`), and to ask for tiles of 16 is an error. What counts here is copied outside of all loops, and
    its dimensions keep their order; everything else is a copy that `weight_copies` finds. Arguments as there.
    """
    return sum(size for _, size, is_retiled in _copies(program, table, sizes, least) if is_retiled)


def _copies(
    program: str, table: Iterable[Parameter], sizes: Mapping[str, int], least: int
) -> Iterator[tuple[str, int, bool]]:
    """Each copy of a weight: what it is, its bytes, and whether it is of an argument into other tiles."""
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
    entry = _ENTRY.search(program)
    for instruction, within in ((one, name) for name, body in bodies.items() if name not in fused for one in body):
        moved = _moved(instruction, bodies)
        matrix = tuple(sorted(instruction.dims))
        if not moved or matrix in used and _is_computed_and_lies_so(instruction, moved, bodies[within], bodies):
            continue
        size = math.prod(matrix) * _BYTES.get(instruction.shape.partition("[")[0], 4)
        is_used = matrix in used or ("pad" in moved and any(_is_padded(matrix, shape) for shape in used))
        if is_used or matrix in at_rest and {"copy", "transpose"} & set(moved):
            retiled = entry is not None and _is_retiled(instruction, within, bodies, entry[1])
            yield f"{instruction.shape}{'' if is_used else ' at rest'} by {moved[0]}", size, retiled


def _in_products(program: str) -> Iterator[_Instruction]:
    """What goes into products and comes out of them, but for those that are ragged."""
    bodies = dict(_computations(program))
    calls = [(one.called, name, is_ragged(one.line)) for name, body in bodies.items() for one in body if one.called]
    ragged = {called for called, _, is_one in calls if is_one}
    while more := {called for called, name, _ in calls if name in ragged} - ragged:
        ragged |= more
    for body in (body for name, body in bodies.items() if name not in ragged):
        for one in body:
            if one.opcode in _PRODUCTS:
                given = one.line.partition(f" {one.opcode}(")[2].partition(")")[0]
                names = {one.name, *re.findall(r"%([\w.\-]+)", given)}
                yield from (other for other in body if other.name in names)


def _rows_of_all(dims: tuple[int, ...], experts: int, sides: set[int]) -> int:
    """How many rows there are in all, of rows for every expert as wide as one of the sides; 0 of anything else."""
    rest = list(dims)
    for kind in {experts}, sides:
        place = next((i for i, size in enumerate(rest) if size in kind), None)
        if place is None:
            return 0
        del rest[place]
    return 0 if set(rest) <= sides else experts * math.prod(rest)


def _tokens(config: TrainConfig, sizes: MeshShape) -> int:
    """The tokens of one device, in the part of the batch that is taken at once."""
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
            called = called[1] if called else None
            for dtype, sizes, layout in _SHAPE.findall(match[2]):
                dims = tuple(int(n) for n in sizes.split(",") if n and n != "1")
                one = (match[1], f"{dtype}[{sizes}]", dims, layout, match[3], match[4], called, line)
                body.append(_Instruction(*one))
        elif line.startswith("}"):
            yield name, body


def _moved(instruction: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> list[str]:
    """The moves that an instruction is made of; none if it also computes."""
    if instruction.opcode != "fusion":
        return [instruction.opcode] if instruction.opcode in _MOVES else []
    # What is computed of single numbers is where a slice begins.
    inside = [one.opcode for one in bodies.get(instruction.called, ()) if one.dims]
    return [op for op in inside if op in _MOVES] if all(op in (*_MOVES, *_STANDS) for op in inside) else []


def _is_computed_and_lies_so(
    instruction: _Instruction, moved: list[str], beside: list[_Instruction], bodies: Mapping[str, list[_Instruction]]
) -> bool:
    """Whether an instruction cuts its part out of a product, or copies what was computed without a change of layout."""
    source = _find(instruction.operand, beside)
    if source is None:
        return False
    if set(moved) <= set(_CUTS):
        return any(one.opcode in _PRODUCTS for one in (source, *bodies.get(source.called, ())))
    if instruction.opcode != "copy" or source.in_memory != instruction.in_memory:
        return False
    if source.opcode == "get-tuple-element":
        loop = _find(source.operand, beside)
        return loop is not None and loop.opcode == "while" and _is_changed(loop, source, bodies)
    inside = {one.opcode for one in bodies.get(source.called, ())}
    return bool(inside - {*_MOVES, *_STANDS, "convert"})  # A weight that was cast is still one.


def _is_changed(loop: _Instruction, element: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> bool:
    """Whether an element of a loop's result is computed in the loop, rather than handed through."""
    body = bodies[_BODY.search(loop.line)[1]]
    root = next(one for one in reversed(body) if "ROOT " in one.line)
    index = int(_INDEX.search(element.line)[1])
    names = re.findall(r"%([\w.\-]+)", root.line.partition(" tuple(")[2].partition(")")[0])
    last = _find(names[index], body) if names else None
    return last is not None and last.opcode != "get-tuple-element"


def _find(name: str | None, body: list[_Instruction]) -> _Instruction | None:
    return next((one for one in body if one.name == name), None)


def _is_retiled(instruction: _Instruction, within: str, bodies: Mapping[str, list[_Instruction]], entry: str) -> bool:
    """Whether an instruction copies an argument of the program, once, and its dimensions keep their order.

    The argument may have been fetched into faster memory, gathered, or handed to another kind of core, which copies it.
    """
    source = _find(instruction.operand, bodies[within])
    if instruction.opcode != "copy" or source is None or source.order != instruction.order:
        return False
    while source is not None and (source.opcode != "parameter" or within != entry):
        if source.opcode == "parameter":
            source, within = _handed(within, bodies)
        elif source.opcode == "custom-call-done":
            source = _gathered(source, bodies[within], bodies)
        elif (
            source.opcode in (*_PREFETCHES, *_GATHERS)
            or _PARTS_TOGETHER in source.line
            or _is_alone(source, bodies[within])
        ):
            source = _find(source.operand, bodies[within])
        else:
            return False
    return source is not None


def _gathered(
    done: _Instruction, body: list[_Instruction], bodies: Mapping[str, list[_Instruction]]
) -> _Instruction | None:
    """What a call in parts gathers, on another kind of core; None if it does anything else."""
    update = _find(done.operand, body)
    start = _find(update.operand, body) if update else None
    called = _CALLS.search(start.line) if start else None
    inside = {one.opcode for one in bodies.get(called[1], ())} if called else set()
    second = _SECOND.search(update.line) if update else None
    return _find(second[1], body) if second and "all-gather" in inside <= {"all-gather", *_STANDS} else None


def _is_alone(one: _Instruction, body: list[_Instruction]) -> bool:
    """Whether it is a tuple of one element, or that element."""
    of = _find(one.operand, body) if one.opcode == "get-tuple-element" else one
    return of is not None and of.opcode == "tuple" and sum(other.name == of.name for other in body) == 1


def _handed(called: str, bodies: Mapping[str, list[_Instruction]]) -> tuple[_Instruction | None, str]:
    """What a computation that is called, by itself or on another core, is called with, and in which computation.

    A call in parts has its operand in its second one: `custom-call-update(%start, %operand)`.
    """
    for name, body in bodies.items():
        for call in body:
            if (match := _CALLS.search(call.line)) and match[1] == called:
                operand = call.operand or next((_SECOND.search(o.line) for o in body if o.operand == call.name), None)
                operand = operand[1] if isinstance(operand, re.Match) else operand
                return _find(operand, body), name
    return None, called
