"""How long a compiled program would take: its arithmetic, its memory traffic and its collectives, loop by loop.

A program is HLO as text, one device's part of it, in the order in which it runs. FLOPs are those of its products, also
within fusions; bytes what every instruction reads and writes, of a slice its own size and not that of what it is cut
out of; both times the trip counts of the loops around them. What a collective that begins and ends in two instructions
needs is hidden as far as there is other work between the two. Of kernels the program shows only what they read and
write; their arithmetic is given. So it is with the ragged products that a TPU's compiler makes itself (`is_ragged`),
which stand there as if every group were multiplied with every row. Rates and what else is assumed: rates.py.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from twotower_jax.planning.rates import Rates

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s4": 0.5,
    "u4": 0.5,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
}
_BYTES |= {"u64": 8, "c64": 8, "token": 0, "opaque": 0}
# What moves nothing: names for what is there, and the borders of what is counted elsewhere.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id",
         "domain", "replica-id", "optimization-barrier", "while", "call", "conditional")  # fmt: skip
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
# An array in a TPU's memory on the chip: its layout ends with a memory space, of which 0 is the device's.
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\((?:[1-46-9]|\d\d)\)\}")  # 5 is the host's.
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton")  # How the targets of kernels begin.
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "fusion-start", "async-start")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_RAGGED = '"is_ragged_dot":true', '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS"'


class Prediction(NamedTuple):
    """One device and one call. Seconds add up but for the hidden ones: total = arithmetic + memory + exposed.

    Attributes:
      flops: of products. bytes: read and written. link_bytes: sent, by kind of collective.
      arithmetic, memory: time of the instructions that each of the two limits.
      exposed, hidden: time of collectives that nothing else, or something else, fills.
      uncounted: calls of kernels whose arithmetic the program does not show, and loops whose trips it does not.
      kernel_traffic: of the memory's time, that of the kernels.
    """

    flops: float
    bytes: float
    link_bytes: dict[str, float]
    arithmetic: float
    memory: float
    exposed: float
    hidden: float
    uncounted: dict[str, int]
    kernel_traffic: float = 0.0

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.memory + self.exposed

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        times = {"arithmetic": self.arithmetic, "memory": self.memory, "links": self.exposed}
        return max(times, key=times.get)


def as_figures(found: Prediction | None) -> dict[str, Any] | None:
    """JSON values."""
    return found and found._asdict() | {"seconds": found.seconds, "limit": found.limit}


class _Instruction(NamedTuple):
    """A line: `rest` is what follows the opening bracket."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def is_ragged(instruction: str) -> bool:
    """Whether a line of a program is a product of sorted rows with a matrix for each group that does no more than that.

    TPUs without a kernel for it have a fusion whose products, as they are written, are of all groups with all rows,
    masked. Its loop goes over groups and tiles of rows, and from the last tile of one group to the first of the next by
    the table of where they begin (libtpu 0.0.52, its machine code for v6e): a group has the tiles that its rows lie in.
    """
    return all(word in instruction for word in _RAGGED)


def predict(program: str, rates: Rates, peak_flops: float, kernel_flops: float = 0.0) -> Prediction:
    """What a program of one device takes.

    Args:
      kernel_flops: what all its kernels compute together.

    Raises:
      ValueError: if it has no entry.
    """
    found = _Program(program, rates, peak_flops).total()
    if "kernels" not in found.uncounted:
        return found
    found, arithmetic = found._replace(flops=found.flops + kernel_flops), kernel_flops / peak_flops
    if arithmetic <= found.kernel_traffic:
        return found
    return found._replace(arithmetic=found.arithmetic + arithmetic, memory=found.memory - found.kernel_traffic)


class _Channel:
    """The links, or the memory: the time that other work has left them so far, and up to where of it is taken."""

    def __init__(self):
        self.free = self.taken = 0.0

    def hide(self, seconds: float, since: float) -> float:
        """How much of some seconds that could begin at `since` passes beside other work."""
        begin = max(since, self.taken)
        hidden = min(seconds, self.free - begin)
        self.taken = begin + hidden
        return hidden


class _Moving:
    """A collective or, without a kind, a copy that has begun: what it needs and moves, and since when."""

    def __init__(self, channel: _Channel, seconds: float, kind: str | None, size: float):
        self._channel, self._since = channel, channel.free
        self._seconds, self._kind, self._size = seconds, kind, size

    def end(self) -> Prediction:
        hidden = self._channel.hide(self._seconds, self._since)
        if self._kind is None:
            return _sum([])._replace(bytes=self._size, memory=self._seconds - hidden)
        return _sum([])._replace(link_bytes={self._kind: self._size}, exposed=self._seconds - hidden, hidden=hidden)


class _Program:
    def __init__(self, text: str, rates: Rates, peak_flops: float):
        self._rates, self._peak = rates, peak_flops
        self._bodies: dict[str, list[_Instruction]] = {}
        self._entry, body = None, []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                body = self._bodies.setdefault(match[2], [])
                self._entry = match[2] if match[1] else self._entry
            elif match := _INSTRUCTION.match(line):
                name, shape, opcode, rest = match.groups()
                given = rest[: _closing(rest)]
                body.append(_Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", given)), rest))
        if self._entry is None:
            raise ValueError("the program has no ENTRY computation")
        self._flops: dict[str, float] = {}

    def total(self) -> Prediction:
        return self._sequence(self._entry)

    def _sequence(self, name: str) -> Prediction:
        """All instructions of a computation that are not fused."""
        parts, under_way, links, memory = [], {}, _Channel(), _Channel()
        shapes = {one.name: one.shape for one in self._bodies[name]}
        for one in self._bodies[name]:
            kind, phase = self._collective(one)
            if one.opcode.endswith(("-update", "-done")):
                moving = under_way.pop(one.operands[0], None) if one.operands else None
                if moving and one.opcode.endswith("-done"):
                    parts.append(moving.end())
                elif moving:
                    under_way[one.name] = moving
                elif one.opcode in ("call-done", "custom-call-done"):
                    # What another kind of core fetches, as the tables of a TPU's gathers.
                    size = 2 * _size(one.shape)
                    parts.append(_sum([])._replace(bytes=size, memory=size / self._rates.memory))
            elif kind is not None:
                sent, group = self._sent(one, kind, shapes)
                moving = _Moving(links, sent / self._rates.link_rate(group), kind, sent)
                if phase == "start":
                    under_way[one.name] = moving
                else:
                    parts.append(moving.end())
            elif copied := self._copied(one, shapes):
                under_way[one.name] = _Moving(memory, copied / self._rates.memory, None, copied)
            else:
                part = self._one(one, shapes)
                parts.append(part)
                links.free += part.arithmetic + part.memory
                memory.free += max(0.0, part.arithmetic + part.memory - part.bytes / self._rates.memory)
        return _sum(parts)

    def _copied(self, one: _Instruction, shapes: dict[str, str]) -> float:
        """Bytes that a copy in two instructions moves, which goes on beside other work; 0 if it is none."""
        if one.opcode not in _COPIES or self._instruction_flops(one, shapes):
            return 0.0
        return self._traffic(one, shapes)

    def _one(self, one: _Instruction, shapes: dict[str, str]) -> Prediction:
        if one.opcode == "while":
            trips = self._trips(one)
            inside = _sum([self._sequence(called) for called in _CALLED.findall(one.rest)])
            times = _times(inside, trips or 1)
            return times if trips else _sum([times, _sum([])._replace(uncounted={"loops": 1})])
        if one.opcode == "call":
            return _sum([self._sequence(called) for called in _CALLED.findall(one.rest)])
        if one.opcode == "conditional":
            names = [n for many, single in _BRANCHES.findall(one.rest) for n in re.findall(r"[\w.\-]+", many or single)]
            return max((self._sequence(called) for called in names), key=lambda part: part.seconds, default=_sum([]))
        target = _TARGET.search(one.rest)[1] if one.opcode == "custom-call" else ""
        if one.opcode in _FREE or one.opcode.endswith("-start") or target in _NO_WORK:
            return _sum([])
        flops, size = self._instruction_flops(one, shapes), self._traffic(one, shapes)
        arithmetic, memory = flops / self._peak, size / self._rates.memory
        hidden_kernel = target.startswith(_KERNELS) or is_ragged(one.rest)
        return _sum([])._replace(
            flops=flops,
            bytes=size,
            arithmetic=arithmetic if arithmetic >= memory else 0.0,
            memory=memory if memory > arithmetic else 0.0,
            uncounted={"kernels": 1} if hidden_kernel else {},
            kernel_traffic=memory if hidden_kernel else 0.0,
        )

    def _trips(self, one: _Instruction) -> int | None:
        """How often a loop runs, as the compiler or its condition, a number below a constant, says; None if neither."""
        if known := _TRIPS.search(one.rest):
            return int(known[1])
        named = re.search(r"condition=%?([\w.\-]+)", one.rest)
        body = {line.name: line for line in self._bodies.get(named[1] if named else "", ())}
        last = next(reversed(body.values()), None)
        if last is None or last.opcode != "compare" or "direction=LT" not in last.rest:
            return None
        bound = body.get(last.operands[-1])
        constant = re.match(r"(\d+)\)", bound.rest) if bound and bound.opcode == "constant" else None
        return constant and int(constant[1])

    def _instruction_flops(self, one: _Instruction, shapes: dict[str, str]) -> float:
        if one.opcode == "dot":
            contracted = _CONTRACTED.search(one.rest)
            _, sizes = next(_arrays(shapes.get(one.operands[0], one.shape)))
            depth = math.prod(sizes[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
            return 2.0 * depth * sum(math.prod(dims) for _, dims in _arrays(one.shape))
        if one.opcode == "convolution":
            return _convolution_flops(one, *(next(_arrays(shapes[operand]))[1] for operand in one.operands[:2]))
        if is_ragged(one.rest):
            return 0.0
        if one.opcode in ("fusion", "fusion-start", "async-start"):
            return sum(self._inside(called) for called in _CALLED.findall(one.rest))
        return 0.0

    def _inside(self, name: str) -> float:
        """FLOPs of a fused computation."""
        if name not in self._flops:
            shapes = {one.name: one.shape for one in self._bodies.get(name, ())}
            self._flops[name] = sum(self._instruction_flops(one, shapes) for one in self._bodies.get(name, ()))
        return self._flops[name]

    def _traffic(self, one: _Instruction, shapes: dict[str, str]) -> float:
        """Bytes of the device's memory; not those that lie on the chip."""
        opcode = one.opcode.removesuffix("-start")
        given = [shapes.get(operand, "") for operand in one.operands]
        result = one.shape if opcode == one.opcode else _result(one)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return _size(result) + (_size(result, on_chip=True) if _size(given[0]) else 0.0)
        if opcode == "dynamic-update-slice":
            return 2 * _size(given[1]) if _size(result) else _size(given[1])
        read, written = [_size(shape) for shape in given], _size(result)
        for called in _CALLED.findall(one.rest) if opcode == "fusion" else ():
            read, written = self._fused_traffic(called, read, written)
        return sum(read) + written

    def _fused_traffic(self, name: str, read: list[float], written: float) -> tuple[list[float], float]:
        """Operands of which only a slice is read count as that; a root that updates a slice writes no more."""
        body, read = self._bodies.get(name, []), list(read)
        shapes = {one.name: one.shape for one in body}
        for parameter in (one for one in body if one.opcode == "parameter"):
            users = [one for one in body if parameter.name in one.operands]
            index = int(parameter.rest.partition(")")[0])
            if not users or index >= len(read) or not read[index]:
                continue
            if all(u.opcode in ("dynamic-slice", "slice", "gather") and u.operands[0] == parameter.name for u in users):
                read[index] = sum(_size(user.shape) for user in users)
            elif all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
                read[index] = 0.0  # Updated in place.
        if written and body and body[-1].opcode == "dynamic-update-slice":
            written = _size(shapes.get(body[-1].operands[1], ""))
        return read, written

    def _collective(self, one: _Instruction) -> tuple[str | None, str]:
        """The kind, and whether it begins ("start"), goes on, ends ("done") or does all of it ("")."""
        for phase in ("start", "update", "done", ""):
            kind = one.opcode.removesuffix(f"-{phase}") if phase else one.opcode
            if phase and kind == one.opcode:
                continue
            if kind in _COLLECTIVES:
                return kind, phase
            if kind in ("async", "custom-call") and phase:  # the latter on a core of its own, as on tpu7x
                called = next(iter(_CALLED.findall(one.rest)), None)
                inside = [i.opcode for i in self._bodies.get(called, ()) if i.opcode in _COLLECTIVES]
                if inside or kind == "async" and phase != "start":
                    return (inside or ["async"])[0], phase
        return None, ""

    def _sent(self, one: _Instruction, kind: str, shapes: dict[str, str]) -> tuple[float, int]:
        """Bytes that a device sends along a ring, and how many devices the ring has."""
        called = next(iter(_CALLED.findall(one.rest)), None)
        within = [i for i in self._bodies.get(called, ()) if i.opcode == kind]
        if within:
            one, shapes = within[0], {i.name: i.shape for i in self._bodies[called]}
        group = _group_size(one.rest)
        given = sum(_size(shapes.get(operand, ""), on_chip=True) for operand in one.operands)
        if kind == "all-gather":
            return given * (group - 1), group
        if kind == "all-reduce":
            return 2 * given * (group - 1) / group, group
        return given if kind == "collective-permute" else given * (group - 1) / group, group


def _convolution_flops(one: _Instruction, given: list[int], kernel: list[int]) -> float:
    """Twice the products of a number of `given` with one of `kernel`; with what is inserted or padded there are none.

    What a TPU writes down as a dilated window is often a batch of products, each dimension of the batch one of the
    window's: of n · n pairs of an output and a place of the window, n meet a number. Groups of features have a smaller
    kernel, and groups of the batch a smaller result, and need no more said.
    """
    of_given, of_kernel, of_out = _LABELS.search(one.rest).groups()
    out = next(_arrays(one.shape))[1]
    pairs = 1
    if window := _WINDOW.search(one.rest):
        sides = {name: sizes.split("x") for name, _, sizes in (part.partition("=") for part in window[1].split())}
        for d, size in enumerate(sides["size"]):
            stride, spread, apart = (
                int(sides[n][d]) if n in sides else 1 for n in ("stride", "lhs_dilate", "rhs_dilate")
            )
            before = int(sides["pad"][d].partition("_")[0]) if "pad" in sides else 0
            inputs, outputs = given[of_given.index(str(d))], out[of_out.index(str(d))]
            place = stride * np.arange(outputs) - before
            met = [place + apart * k for k in range(int(size))]
            pairs *= sum(int(np.sum((p >= 0) & (p <= spread * (inputs - 1)) & (p % spread == 0))) for p in met)
    return 2.0 * pairs * out[of_out.index("b")] * out[of_out.index("f")] * kernel[of_kernel.index("i")]


def _closing(text: str) -> int:
    """Where the bracket closes that was opened before."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for dtype, dims in _SHAPE.findall(shape):
        yield dtype, [int(n) for n in dims.split(",") if n]


def _size(shape: str, on_chip: bool = False) -> float:
    """Bytes; what is neither listed nor of one byte has four. Only what lies in the device's memory, or all."""
    shape = shape if on_chip else _ON_CHIP.sub("", shape)
    return sum(_BYTES.get(d, 1 if d.startswith("f8") else 4) * math.prod(dims) for d, dims in _arrays(shape))


def _result(one: _Instruction) -> str:
    """The shape of what an instruction that begins a copy will give: its tuple has it first, or after the operands."""
    inner = one.shape.removeprefix("(")
    if one.opcode == "copy-start":
        return _ARRAY.match(inner)[0]
    return _ARRAY.match(inner[_closing(inner[1:]) + 2 :].lstrip(", "))[0] if inner.startswith("(") else inner


def _group_size(rest: str) -> int:
    """The size of a collective's replica groups, in each way that XLA writes them; 2 for pairs."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    return 2


def _sum(parts: list[Prediction]) -> Prediction:
    merged = []
    for field in ("link_bytes", "uncounted"):
        names = sorted({name for part in parts for name in getattr(part, field)})
        merged.append({name: sum(getattr(part, field).get(name, 0) for part in parts) for name in names})
    names = ("flops", "bytes", "arithmetic", "memory", "exposed", "hidden", "kernel_traffic")
    numbers = {name: sum(getattr(part, name) for part in parts) for name in names}
    return Prediction(link_bytes=merged[0], uncounted=merged[1], **numbers)


def _times(part: Prediction, trips: int) -> Prediction:
    return Prediction(*({n: trips * v for n, v in x.items()} if isinstance(x, dict) else trips * x for x in part))
