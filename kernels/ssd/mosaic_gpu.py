"""The SSD scans of one tower and of two in Pallas Mosaic GPU, for NVIDIA Hopper.

What is done is what gpu.py and two_tower_gpu.py do. Here are the three kernels that they are composed of
(gpu_layout.py says which, and what each computes), which take tiles of t = 64 positions. In their maths a is a
position of the tile of rows, b of a tile of columns of the same chunk, and r a head of the group:

    query_a, key_b (N)               queries, keys        B or C of the group
    upstream_a, value_b (P)          upstream, values     dy or x of head r
    exp(q_i − k_j)                   decay                (t, t), 0 where the pair is not seen; a and b are i and j
    dt_j                             step_size            (t, t), of the writer
    query_a · key_b                  scores               (t, t), of all heads
    (upstream_a · value_b) decay     mixed                (t, t), of head r; in `outputs` (query_a · key_b) decay dt
    Σ_r mixed dt                     dscores              (t, t), the gradient of scores
    Σ_b mixed scores                 by_step              (t,), of head r; times dt, `by_decay`
    h or g at the chunk's edge       edges                (P, N), which `through` scales by exp(a) or w
    (upstream_a edge)                pulled               (t, N); · query_a, `crossing`
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.hardware import gpu
from twotower_jax.kernels.hardware.gpu import NN, NT, TN, call, load, load_along, load_down, store, sum_rows, tiled
from twotower_jax.kernels.hardware.hopper import interpreter, not_hopper
from twotower_jax.kernels.ssd import gpu as one_tower
from twotower_jax.kernels.ssd import two_tower_gpu as two_towers
from twotower_jax.kernels.ssd.gpu_layout import Cut, Pairs, Programs, RowSums, Source, too_long


class _Triangle:
    """The decays of one head between a tile of rows and one of columns."""

    def __init__(self, cut: Cut, pairs: Pairs, decays, batch, head, chunk, readers_in_rows: bool):
        self.cut, self.pairs, self.decays, self.readers_in_rows = cut, pairs, decays, readers_in_rows
        self.place, self.chunk, self.shape = (batch, head), chunk, (cut.tile, cut.tile)

    def _load(self, ref, tile, of_readers: bool):
        """(t, t): the numbers of a tile's positions along the rows or the columns where they stand."""
        rows = self.cut.of_tile(self.chunk, tile)
        load_across = load_down if of_readers == self.readers_in_rows else load_along
        return load_across(ref.at[(*self.place, rows)], self.shape)

    def positions(self, row, column):
        """Of readers and of writers, in the chunk."""
        i = row * self.cut.tile + gpu.iota(self.shape, 0)
        j = column * self.cut.tile + gpu.iota(self.shape, 1)
        return (i, j) if self.readers_in_rows else (j, i)

    def decay(self, row, column) -> jax.Array:
        """exp(q_i − k_j), and 0 where the pair is not seen."""
        reader, writer = (row, column) if self.readers_in_rows else (column, row)
        readers, writers = self.decays.readers, self.decays.writers
        difference = [
            self._load(q, reader, True) - self._load(k, writer, False) for q, k in zip(readers, writers, strict=True)
        ]
        seen = self.pairs.seen(*self.positions(row, column))
        # Masked before the exponential, which would overflow for a writer after its reader.
        return jnp.exp(jnp.where(seen, difference[0] + difference[1], -jnp.inf))

    def step_size(self, row, column) -> jax.Array:
        """dt of the writer."""
        return self._load(self.decays.dt, column if self.readers_in_rows else row, False)


def _place(cut: Cut):
    """The chunk of this block of the grid, and the tile in it."""
    index = lax.axis_index("tile")
    return lax.div(index, cut.tiles), lax.rem(index, cut.tiles)


def _pieces(head_dim: int):
    """The P rows of a state, 64 at a time, which a product has; the last ones may begin among those before them."""
    size = min(head_dim, gpu.TILE)
    return [pl.ds(first, size) for first in [*range(0, head_dim - size, size), head_dim - size]]


def _put_edge(space, ref):
    """Stores a state, (P, n) in global memory, as an operand of `product`."""
    for rows in _pieces(ref.shape[0]):
        gpu.put_parts(space.at[:, rows], load(ref.at[rows]))


# States.


def states(cut: Cut, values, keys, weights, kept, initial, *, backward: bool = False):
    """The recurrence; see `Programs`.

    One block of the grid takes a head and 64 columns of its state, which never leaves the registers. Tiles of values
    and keys are under way while the one before is multiplied.
    """
    width = cut.slice_width
    edges = jax.ShapeDtypeStruct((*kept.shape, cut.head_dim, cut.state), jnp.float32)
    last = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    staged = {
        "values": plgpu.SMEM((2, cut.tile, cut.head_dim), values.dtype),
        "keys": plgpu.SMEM((2, cut.tile, width), keys.dtype),
        "weights": plgpu.SMEM((2, cut.tile), jnp.float32),
    }
    spaces = {
        "staged": staged,
        "arrived": plgpu.Barrier(num_arrivals=len(staged), num_barriers=2),
        "weighted": [gpu.parts_space(cut.tile, rows.size) for rows in _pieces(cut.head_dim)],
        "keys": None if gpu.is_bfloat16(keys) else gpu.parts_space(cut.tile, width),
    }

    def _states(inputs, outputs, spaces):
        _states_block(cut, width, backward, inputs, outputs, spaces)

    grid = {"batch": cut.batch, "head": cut.heads, "columns": cut.state // width}
    inputs = {"values": values, "keys": keys, "weights": weights, "kept": kept, "initial": initial}
    return call(_states, grid, inputs, (edges, last), spaces, cut.interpret)


def _states_block(cut: Cut, width: int, backward: bool, inputs, outputs, spaces):
    batch, head, slice_ = (lax.axis_index(name) for name in ("batch", "head", "columns"))
    columns = pl.ds(slice_ * width, width)
    first_key = lax.div(head, cut.per_group) * cut.state + slice_ * width
    edges, last = outputs
    chunks, pieces = cut.length // cut.chunk, _pieces(cut.head_dim)
    steps = chunks * cut.tiles

    def chunk_of(k):
        return chunks - 1 - k if backward else k

    def start(step):
        """Begins to load the tile of a step into one of two places."""
        slot = lax.rem(step, 2)
        rows = cut.of_tile(chunk_of(lax.div(step, cut.tiles)), lax.rem(step, cut.tiles))
        sources = {
            "values": inputs["values"].at[batch, rows, cut.of_head(head)],
            "keys": inputs["keys"].at[batch, rows, pl.ds(first_key, width)],
            "weights": inputs["weights"].at[batch, head, rows],
        }
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, spaces["staged"][name].at[slot], spaces["arrived"].at[slot])

    def added(step):
        """What the tile of a step adds to each piece of the state."""
        slot = lax.rem(step, 2)
        plgpu.barrier_wait(spaces["arrived"].at[slot])

        # The other place was read in the step before, which has awaited its products.
        @pl.when(step + 1 < steps)
        def _():
            start(step + 1)

        staged = {name: space.at[slot] for name, space in spaces["staged"].items()}
        for space, rows in zip(spaces["weighted"], pieces, strict=True):
            value = tiled(staged["values"][:, rows]).astype(jnp.float32)
            gpu.put_parts(space, value * load_down(staged["weights"], value.shape))
        if spaces["keys"] is None:
            keys = spaces["staged"]["keys"].at[pl.ds(slot, 1)]
        else:
            gpu.put_parts(spaces["keys"], tiled(staged["keys"][...]))
            keys = spaces["keys"]
        return [gpu.product(space, keys, TN) for space in spaces["weighted"]]

    def through_chunk(k, state):
        place = batch, head, chunk_of(k)
        for rows, piece in zip(pieces, state, strict=True):
            store(edges.at[(*place, rows, columns)], piece)
        state = [piece * inputs["kept"][place] for piece in state]
        for tile in range(cut.tiles):
            state = [piece + more for piece, more in zip(state, added(k * cut.tiles + tile), strict=True)]
        return state

    start(jnp.int32(0))
    state = [load(inputs["initial"].at[batch, head, rows, columns]) for rows in pieces]
    state = lax.fori_loop(0, chunks, through_chunk, state)
    for rows, piece in zip(pieces, state, strict=True):
        store(last.at[batch, head, rows, columns], piece)


# Outputs.


def outputs(cut: Cut, queries, pairs: tuple[Pairs, ...], sources: tuple[Source, ...], through, *, readers_in_rows=True):
    """What rows read; see `Programs`. One block of the grid takes a tile of rows of a head."""
    scratch = {"queries": gpu.operand_space(queries, cut.tile, cut.state), "arrived": plgpu.Barrier(num_barriers=3)}

    def _outputs(inputs, output, spaces):
        _outputs_block(cut, pairs, readers_in_rows, inputs, output, spaces)

    grid = {"batch": cut.batch, "tile": cut.length // cut.tile, "head": cut.heads}
    inputs = {"queries": queries, "sources": sources, "through": through}
    output = jax.ShapeDtypeStruct((cut.batch, cut.length, cut.heads * cut.head_dim), jnp.float32)
    return call(_outputs, grid, inputs, output, scratch, cut.interpret)


def _outputs_block(cut: Cut, pairs, readers_in_rows, inputs, output, spaces):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    (chunk, row), group, arrived = _place(cut), lax.div(head, cut.per_group), spaces["arrived"]
    rows = cut.of_tile(chunk, row)
    shape = cut.tile, cut.head_dim
    queries = gpu.Operand(inputs["queries"], spaces["queries"], arrived.at[0])
    queries.start((batch, rows, cut.of_group(group)))

    if inputs["through"] is None:
        queries.wait()
        total = gpu.zeros(shape)
    else:
        scales, edges = inputs["through"]

        def through(edge_space):
            _put_edge(edge_space, edges.at[batch, head, chunk])
            queries.wait()
            scale = load_down(scales.at[batch, head, rows], shape)
            return gpu.product(spaces["queries"], edge_space, NT) * scale

        total = pl.run_scoped(through, gpu.parts_space(cut.head_dim, cut.state))

    for which, source in zip(pairs, inputs["sources"], strict=True):
        triangle = _Triangle(cut, which, source.decays, batch, head, chunk, readers_in_rows)

        def within(key_space, value_space, mixed_space, source=source, triangle=triangle, which=which, total=total):
            keys = gpu.Operand(source.keys, key_space, arrived.at[1])
            values = gpu.Operand(source.values, value_space, arrived.at[2])

            def step(column, total):
                columns = cut.of_tile(chunk, column)
                keys.start((batch, columns, cut.of_group(group)))
                values.start((batch, columns, cut.of_head(head)))
                decay = triangle.decay(row, column) * triangle.step_size(row, column)
                mixed = gpu.product(spaces["queries"], keys.wait(), NT) * decay
                gpu.put_parts(mixed_space, mixed)
                return total + gpu.product(mixed_space, values.wait(), NN)

            return lax.fori_loop(*which.tiles(cut, row, readers_in_rows), step, total)

        total = pl.run_scoped(
            within,
            gpu.operand_space(source.keys, cut.tile, cut.state),
            gpu.operand_space(source.values, cut.tile, cut.head_dim),
            gpu.parts_space(cut.tile, cut.tile),
        )
    store(output.at[batch, rows, cut.of_head(head)], total)


# Gradients that sum over the heads of a group.


def group_gradients(
    cut: Cut, queries, upstream, pairs: tuple[Pairs, ...], sources: tuple[Source, ...], through, *, readers_in_rows
):
    """The gradient of what a group shares; see `Programs`. One block of the grid takes a tile of rows of a group."""
    row = jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.length), jnp.float32)
    sums = tuple(RowSums(row, None if readers_in_rows else row) for _ in sources)
    gradient = jax.ShapeDtypeStruct((cut.batch, cut.length, cut.groups * cut.state), jnp.float32)
    scratch = {
        "queries": gpu.operand_space(queries, cut.tile, cut.state),
        "upstream": gpu.operand_space(upstream, cut.tile, cut.head_dim),
        "sums": jax.tree.map(lambda _: plgpu.SMEM((cut.per_group, cut.tile), jnp.float32), sums[0]),
        "arrived": plgpu.Barrier(num_barriers=4),
    }

    def _group_gradients(inputs, outputs, spaces):
        _group_gradients_block(cut, pairs, readers_in_rows, inputs, outputs, spaces)

    grid = {"batch": cut.batch, "tile": cut.length // cut.tile, "group": cut.groups}
    inputs = {"queries": queries, "upstream": upstream, "sources": sources, "through": through}
    types = gradient, sums, None if through is None else row
    return call(_group_gradients, grid, inputs, types, scratch, cut.interpret)


def _group_gradients_block(cut: Cut, pairs, readers_in_rows, inputs, outputs, spaces):
    batch, group, (chunk, row) = lax.axis_index("batch"), lax.axis_index("group"), _place(cut)
    gradient, row_sums, crossed = outputs
    arrived, rows = spaces["arrived"], cut.of_tile(chunk, row)
    upstream = gpu.Operand(inputs["upstream"], spaces["upstream"], arrived.at[0])
    queries = gpu.Operand(inputs["queries"], spaces["queries"], arrived.at[1])
    queries.get((batch, rows, cut.of_group(group)))
    # By slices of columns, since registers do not hold much more than one (64, N) at a time.
    width = cut.slice_width
    slices = [pl.ds(first, width) for first in range(0, cut.state, width)]
    total = [gpu.zeros((cut.tile, width)) for _ in slices]

    if inputs["through"] is not None:
        scales, edges = inputs["through"]

        def pull_through_edge(edge_space, total=total):
            """Adds what the state at the chunk's edge contributes, head by head."""

            def of_head(r, total):
                head = group * cut.per_group + r
                upstream.get((batch, rows, cut.of_head(head)))
                scale = load_down(scales.at[batch, head, rows], (cut.tile, width))
                crossing, found = 0.0, []
                for columns, before in zip(slices, total, strict=True):
                    _put_edge(edge_space, edges.at[batch, head, chunk, :, columns])
                    pulled = gpu.product(spaces["upstream"], edge_space, NN)
                    found.append(before + pulled * scale)
                    query = load(inputs["queries"].at[batch, rows, pl.ds(group * cut.state + columns.start, width)])
                    crossing += sum_rows(pulled * query.astype(jnp.float32))
                store(crossed.at[batch, head, rows], crossing)
                return found

            return lax.fori_loop(0, cut.per_group, of_head, total)

        total = pl.run_scoped(pull_through_edge, gpu.parts_space(cut.head_dim, width))

    def clear_sums():
        for space in jax.tree.leaves(spaces["sums"]):
            for r in range(cut.per_group):
                gpu.clear(space.at[r])

    def move_sums(sums):
        for output, space in zip(jax.tree.leaves(sums), jax.tree.leaves(spaces["sums"]), strict=True):
            for r in range(cut.per_group):
                gpu.move(output.at[batch, group * cut.per_group + r, rows], space.at[r])

    for which, source, sums in zip(pairs, inputs["sources"], row_sums, strict=True):

        def add_columns(key_space, value_space, mixed_space, which=which, source=source, total=total):
            """Adds what a source's tiles of columns contribute, and sums over them what each row's decays move."""
            keys = gpu.Operand(source.keys, key_space, arrived.at[2])
            values = gpu.Operand(source.values, value_space, arrived.at[3])
            clear_sums()

            def of_column(column, total):
                columns = cut.of_tile(chunk, column)
                scores = gpu.product(spaces["queries"], keys.get((batch, columns, cut.of_group(group))), NT)

                def of_head(r, dscores, column=column, columns=columns, scores=scores):
                    head = group * cut.per_group + r
                    triangle = _Triangle(cut, which, source.decays, batch, head, chunk, readers_in_rows)
                    upstream.start((batch, rows, cut.of_head(head)))
                    values.start((batch, columns, cut.of_head(head)))
                    decay, step_size = triangle.decay(row, column), triangle.step_size(row, column)
                    mixed = gpu.product(upstream.wait(), values.wait(), NT) * decay
                    by_step = mixed * scores
                    if spaces["sums"].by_step is not None:
                        gpu.add(spaces["sums"].by_step.at[r], sum_rows(by_step))
                    by_decay = by_step * step_size
                    if which.block is None or which.own:
                        # The diagonal does not decay: left out rather than left to cancel.
                        readers, writers = triangle.positions(row, column)
                        by_decay = jnp.where(writers < readers, by_decay, 0.0)
                    gpu.add(spaces["sums"].by_decay.at[r], sum_rows(by_decay))
                    return dscores + mixed * step_size

                dscores = lax.fori_loop(0, cut.per_group, of_head, gpu.zeros((cut.tile, cut.tile)))
                gpu.put_parts(mixed_space, dscores)
                return [
                    before + gpu.product(mixed_space, key_space.at[:, :, columns], NN)
                    for columns, before in zip(slices, total, strict=True)
                ]

            return lax.fori_loop(*which.tiles(cut, row, readers_in_rows), of_column, total)

        total = pl.run_scoped(
            add_columns,
            gpu.operand_space(source.keys, cut.tile, cut.state),
            gpu.operand_space(source.values, cut.tile, cut.head_dim),
            gpu.parts_space(cut.tile, cut.tile),
        )
        move_sums(sums)
    for columns, found in zip(slices, total, strict=True):
        store(gradient.at[batch, rows, pl.ds(group * cut.state + columns.start, width)], found)


# The scans.

_PROGRAMS = Programs(states, outputs, group_gradients, gpu.TILE)
# P and N whose tiles fit into shared memory in every kernel, as float32 too.
_HEAD_DIMS, _STATES = (64, 80), (64, 128)


def unsupported(x, dt, log_decay, b, c, *context, initial_state=None, block_size=1, chunk_size=128) -> str | None:
    """Why the hardware cannot run `ssd`, or with a context `two_tower_ssd`, on these shapes, or None."""
    if problem := not_hopper():
        return problem
    head_dim, state = x.shape[3], b.shape[3]
    if head_dim not in _HEAD_DIMS or state not in _STATES:
        return f"heads of {head_dim} with a state of {state} (made for heads of {_HEAD_DIMS}, states of {_STATES})"
    return too_long(x.shape[1], chunk_size, block_size)


def ssd(*arrays, interpret=False, **options):
    """`kernels.ssd`, same arguments and results. `interpret`: True or how, to run it on any backend."""
    return one_tower.ssd(*arrays, programs=_PROGRAMS, interpret=interpreter(interpret), **options)


def two_tower_ssd(*arrays, interpret=False, **options):
    """`kernels.two_tower_ssd`, same arguments and results. `interpret`: True or how, to run it on any backend."""
    return two_towers.two_tower_ssd(*arrays, programs=_PROGRAMS, interpret=interpreter(interpret), **options)
