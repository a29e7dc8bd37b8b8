"""The Triton programs that triton.py runs. `Programs` of gpu_layout.py says what each computes, in the same names.

A program takes a tile of TILE positions (rows a), or a slice of a state's columns, of one head or group. Every size is
a constant of the compilation, as shapes are to XLA; arrays lie as the model has them, (B, L, H·P) and (B, L, G·N).
Sizes of tensors are powers of two: of PADDED_DIM places p of a head the first HEAD_DIM are real, the others zeros.
Positions of the tile of rows are a, of a tile of columns of the same chunk b, and r is a head of the group:

    query_a, key_b (N)               query, key           B or C of the group
    upstream_a, value_b (P)          up, value            dy or x of head r
    exp(q_i − k_j)                   decay                (TILE, TILE), 0 where the pair is not seen
    dt_j                             step_size            (TILE, 1) or (1, TILE), of the writer
    query_a · key_b                  scores               of all heads
    (upstream_a · value_b) decay     mixed                of head r; in `outputs` (query_a · key_b) decay dt
    Σ_r mixed dt                     dscores              the gradient of scores
    Σ_b mixed scores                 step_sums            (heads, TILE); times dt, decay_sums
    h or g at the chunk's edge       edge                 (P, N), of which a row sees so much: scale
    upstream_a edge                  pulled               (TILE, N); · query_a, crossed

Products of float32 are sums of three of TF32, which keep 21 bits or more. Where EXACT_AS_IS, queries and keys are both
bfloat16, whose products are exact.
"""

import triton
import triton.language as tl

# The interpreter runs only the operation inside a function of the library, such as `tl.sum`.
_ADD = tl.standard._sum_combine


@triton.jit
def _columns(
    tile,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    READERS_IN_ROWS: tl.constexpr,
):
    """From and up to which tile of columns, in a chunk, some pair may be seen by a tile of rows: `Pairs.tiles`."""
    first = tile * TILE
    final = tile * TILE + TILE - 1
    if BLOCK == 0:
        start = 0 if READERS_IN_ROWS else tile
        end = tile + 1 if READERS_IN_ROWS else CHUNK // TILE
    elif READERS_IN_ROWS:
        start = first // BLOCK * BLOCK // TILE if OWN else 0
        end = tile + 1 if OWN else (final // BLOCK * BLOCK + TILE - 1) // TILE
    else:
        start = tile if OWN else (first // BLOCK * BLOCK + BLOCK) // TILE
        end = tl.minimum((final // BLOCK * BLOCK + BLOCK + TILE - 1) // TILE, CHUNK // TILE) if OWN else CHUNK // TILE
    return start, end


@triton.jit
def _pairs(i, j, READERS_IN_ROWS: tl.constexpr):
    """Positions of readers and of writers, from those of rows and of columns."""
    reader = i[:, None] if READERS_IN_ROWS else j[None, :]
    writer = j[None, :] if READERS_IN_ROWS else i[:, None]
    return reader, writer


@triton.jit
def _step_size(dt, rows, columns, READERS_IN_ROWS: tl.constexpr):
    """dt of writers; `rows` and `columns` are places."""
    return tl.load(dt + columns)[None, :] if READERS_IN_ROWS else tl.load(dt + rows)[:, None]


@triton.jit
def _seen(reader, writer, BLOCK: tl.constexpr, OWN: tl.constexpr):
    """Which readers see which writers, by positions in the chunk: `Pairs.seen`."""
    if BLOCK == 0:
        return writer <= reader
    elif OWN:
        return (writer >= reader // BLOCK * BLOCK) & (writer <= reader)
    else:
        return writer < reader // BLOCK * BLOCK


@triton.jit
def _decay(
    readers_coarse,
    readers_fine,
    writers_coarse,
    writers_fine,
    rows,
    columns,
    seen,
    READERS_IN_ROWS: tl.constexpr,
):
    """exp(q_i − k_j) of readers i and writers j, and 0 where the pair is not seen; `rows` and `columns` are places."""
    if READERS_IN_ROWS:
        coarse = tl.load(readers_coarse + rows)[:, None] - tl.load(writers_coarse + columns)[None, :]
        fine = tl.load(readers_fine + rows)[:, None] - tl.load(writers_fine + columns)[None, :]
    else:
        coarse = tl.load(readers_coarse + columns)[None, :] - tl.load(writers_coarse + rows)[:, None]
        fine = tl.load(readers_fine + columns)[None, :] - tl.load(writers_fine + rows)[:, None]
    # Masked before the exponential, which would overflow for a writer after its reader.
    return tl.exp(tl.where(seen, coarse + fine, float("-inf")))


@triton.jit
def _of_head(array, row, head, p, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of (B·L, H·P) of one head, float32; zeros beyond its P columns."""
    place = array + row * (HEADS * HEAD_DIM) + head * HEAD_DIM + p[None, :]
    return tl.load(place, mask=p[None, :] < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _edge(
    edges,
    of_head,
    chunk,
    p,
    n,
    LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
):
    """The state (or its gradient) at a chunk's edge, of one head; zeros beyond its P rows."""
    of_chunk = (of_head * (LENGTH // CHUNK) + chunk) * (HEAD_DIM * STATE)
    return tl.load(edges + of_chunk + p[:, None] * STATE + n[None, :], mask=p[:, None] < HEAD_DIM, other=0.0)


@triton.jit
def states(
    values,
    keys,
    weights,
    kept,
    initial,
    edges,
    last,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    of_head = batch * HEADS + head
    p = tl.arange(0, PADDED_DIM)
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    square = p[:, None] * STATE + n[None, :]
    in_square = p[:, None] < HEAD_DIM
    state = tl.load(initial + of_head * (HEAD_DIM * STATE) + square, mask=in_square, other=0.0)
    for k in range(LENGTH // CHUNK):
        chunk = LENGTH // CHUNK - 1 - k if BACKWARD else k
        of_chunk = of_head * (LENGTH // CHUNK) + chunk
        tl.store(edges + of_chunk * (HEAD_DIM * STATE) + square, state, mask=in_square)
        state *= tl.load(kept + of_chunk)
        for tile in range(CHUNK // TILE):
            rows = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
            row = (batch * LENGTH + rows)[:, None]
            value = _of_head(values, row, head, p, HEADS, HEAD_DIM)
            weighted = value * tl.load(weights + of_head * LENGTH + rows)[:, None]
            key = tl.load(keys + row * (GROUPS * STATE) + group * STATE + n[None, :]).to(tl.float32)
            state = tl.dot(tl.trans(weighted), key, state, input_precision="tf32x3")
    tl.store(last + of_head * (HEAD_DIM * STATE) + square, state, mask=in_square)


@triton.jit
def outputs(
    queries,
    keys,
    values,
    readers_coarse,
    readers_fine,
    writers_coarse,
    writers_fine,
    dt,
    before,
    scales,
    edges,
    output,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    READERS_IN_ROWS: tl.constexpr,
    THROUGH: tl.constexpr,
    ADDED: tl.constexpr,
    EXACT_AS_IS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    chunk = tl.program_id(0) // (CHUNK // TILE)
    tile = tl.program_id(0) % (CHUNK // TILE)
    group = head // (HEADS // GROUPS)
    of_head = batch * HEADS + head
    p = tl.arange(0, PADDED_DIM)
    n = tl.arange(0, STATE)
    i = tile * TILE + tl.arange(0, TILE)
    rows = chunk * CHUNK + i
    row = (batch * LENGTH + rows)[:, None]
    query = tl.load(queries + row * (GROUPS * STATE) + group * STATE + n[None, :])
    place = row * (HEADS * HEAD_DIM) + head * HEAD_DIM + p[None, :]
    if ADDED:
        total = tl.load(before + place, mask=p[None, :] < HEAD_DIM, other=0.0)
    else:
        total = tl.full((TILE, PADDED_DIM), 0.0, tl.float32)
    if THROUGH:
        edge = _edge(edges, of_head, chunk, p, n, LENGTH, CHUNK, HEAD_DIM, STATE)
        scale = tl.load(scales + of_head * LENGTH + rows)[:, None]
        total += scale * tl.dot(query.to(tl.float32), tl.trans(edge), input_precision="tf32x3")
    if not EXACT_AS_IS:
        query = query.to(tl.float32)
    start, end = _columns(tile, CHUNK, TILE, BLOCK, OWN, READERS_IN_ROWS)
    for other in range(start, end):
        j = other * TILE + tl.arange(0, TILE)
        columns = chunk * CHUNK + j
        column = (batch * LENGTH + columns)[:, None]
        key = tl.load(keys + column * (GROUPS * STATE) + group * STATE + n[None, :])
        value = _of_head(values, column, head, p, HEADS, HEAD_DIM)
        if not EXACT_AS_IS:
            key = key.to(tl.float32)
        reader, writer = _pairs(i, j, READERS_IN_ROWS)
        decay = _decay(
            readers_coarse,
            readers_fine,
            writers_coarse,
            writers_fine,
            of_head * LENGTH + rows,
            of_head * LENGTH + columns,
            _seen(reader, writer, BLOCK, OWN),
            READERS_IN_ROWS,
        )
        decay *= _step_size(dt, of_head * LENGTH + rows, of_head * LENGTH + columns, READERS_IN_ROWS)
        mixed = tl.dot(query, tl.trans(key), input_precision="tf32x3") * decay
        total = tl.dot(mixed, value, total, input_precision="tf32x3")
    tl.store(output + place, total, mask=p[None, :] < HEAD_DIM)


@triton.jit
def _pulled_through_edge(
    up,
    edge,
    query,
    scales,
    crossed,
    of_head,
    rows,
    LENGTH: tl.constexpr,
):
    """Phase 1, of a head: what the state at the chunk's edge adds to the gradient. Stores `crossed`."""
    pulled = tl.dot(up, edge, input_precision="tf32x3")
    tl.store(crossed + of_head * LENGTH + rows, tl.reduce(pulled * query.to(tl.float32), 1, _ADD))
    return pulled * tl.load(scales + of_head * LENGTH + rows)[:, None]


@triton.jit
def _pair_gradients(up, value, scores, decay, step_size, reader, writer):
    """Phase 2, of a head and a tile of columns: what it adds to dscores, and its row sums for steps and for decays."""
    mixed = tl.dot(up, tl.trans(value), input_precision="tf32x3") * decay
    step_terms = mixed * scores
    # The diagonal does not decay: left out rather than left to cancel.
    decay_terms = tl.where(writer < reader, step_terms * step_size, 0.0)
    return mixed * step_size, tl.reduce(step_terms, 1, _ADD), tl.reduce(decay_terms, 1, _ADD)


@triton.jit
def group_gradients(
    queries,
    upstream,
    keys,
    values,
    readers_coarse,
    readers_fine,
    writers_coarse,
    writers_fine,
    dt,
    before,
    scales,
    edges,
    gradient,
    by_decay,
    by_step,
    crossed,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    READERS_IN_ROWS: tl.constexpr,
    THROUGH: tl.constexpr,
    ADDED: tl.constexpr,
    EXACT_AS_IS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    chunk = tl.program_id(0) // (CHUNK // TILE)
    tile = tl.program_id(0) % (CHUNK // TILE)
    p = tl.arange(0, PADDED_DIM)
    n = tl.arange(0, STATE)
    i = tile * TILE + tl.arange(0, TILE)
    rows = chunk * CHUNK + i
    row = (batch * LENGTH + rows)[:, None]
    place = row * (GROUPS * STATE) + group * STATE + n[None, :]
    query = tl.load(queries + place)
    total = tl.load(before + place) if ADDED else tl.full((TILE, STATE), 0.0, tl.float32)
    if THROUGH:
        for r in range(HEADS // GROUPS):
            head = group * (HEADS // GROUPS) + r
            of_head = batch * HEADS + head
            up = _of_head(upstream, row, head, p, HEADS, HEAD_DIM)
            edge = _edge(edges, of_head, chunk, p, n, LENGTH, CHUNK, HEAD_DIM, STATE)
            total += _pulled_through_edge(up, edge, query, scales, crossed, of_head, rows, LENGTH)
    if not EXACT_AS_IS:
        query = query.to(tl.float32)

    # Sums have a row for every head, in registers; heads are padded to a power of two.
    heads = tl.arange(0, PADDED_HEADS)
    decay_sums = tl.full((PADDED_HEADS, TILE), 0.0, tl.float32)
    step_sums = tl.full((PADDED_HEADS, TILE), 0.0, tl.float32)
    start, end = _columns(tile, CHUNK, TILE, BLOCK, OWN, READERS_IN_ROWS)
    for other in range(start, end):
        j = other * TILE + tl.arange(0, TILE)
        columns = chunk * CHUNK + j
        column = (batch * LENGTH + columns)[:, None]
        key = tl.load(keys + column * (GROUPS * STATE) + group * STATE + n[None, :])
        if not EXACT_AS_IS:
            key = key.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        reader, writer = _pairs(i, j, READERS_IN_ROWS)
        seen = _seen(reader, writer, BLOCK, OWN)
        dscores = tl.full((TILE, TILE), 0.0, tl.float32)
        for r in range(HEADS // GROUPS):
            head = group * (HEADS // GROUPS) + r
            of_head = batch * HEADS + head
            up = _of_head(upstream, row, head, p, HEADS, HEAD_DIM)
            value = _of_head(values, column, head, p, HEADS, HEAD_DIM)
            decay = _decay(
                readers_coarse,
                readers_fine,
                writers_coarse,
                writers_fine,
                of_head * LENGTH + rows,
                of_head * LENGTH + columns,
                seen,
                READERS_IN_ROWS,
            )
            step_size = _step_size(dt, of_head * LENGTH + rows, of_head * LENGTH + columns, READERS_IN_ROWS)
            own, by_steps, by_decays = _pair_gradients(up, value, scores, decay, step_size, reader, writer)
            of_this = heads[:, None] == r
            step_sums += tl.where(of_this, by_steps[None, :], 0.0)
            decay_sums += tl.where(of_this, by_decays[None, :], 0.0)
            dscores += own
        total = tl.dot(dscores, key.to(tl.float32), total, input_precision="tf32x3")
    tl.store(gradient + place, total)
    of_heads = (batch * HEADS + group * (HEADS // GROUPS) + heads)[:, None] * LENGTH + rows[None, :]
    real = heads[:, None] < HEADS // GROUPS
    tl.store(by_decay + of_heads, decay_sums, mask=real)
    if not READERS_IN_ROWS:
        tl.store(by_step + of_heads, step_sums, mask=real)
