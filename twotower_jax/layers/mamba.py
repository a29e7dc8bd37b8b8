"""The Mamba-2 mixer (Dao & Gu 2024, arXiv 2405.21060), in both towers.

`in_proj` gives [z | xBC | dt]. A causal convolution and SiLU run over xBC, which splits into x, B and C; the scan runs
over them; `out_proj` takes the gated norm of the result, gate before norm.

What lies between the two projections knows its own rows, positions, heads and groups only, and runs on each device by
itself (`sharding.local`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.kernels.block_scan import LONGEST_BLOCK, BlockWeights, add_skip, split_channels
from twotower_jax.kernels.numerics.gated_norm import gated_norm
from twotower_jax.layers import sequence_parallel
from twotower_jax.layers.common import Linear
from twotower_jax.layers.mixer import Mixer, Run, require_divides, require_positive
from twotower_jax.parameters import CONV, Scope, constant, normal, uniform, use


@flax.struct.dataclass
class MambaCache:
    """What a Mamba-2 layer keeps of the tokens so far.

    Attributes:
      conv: (B, W, C), the last W raw inputs of the convolution, newest last; zeros before the first token. Only the
        last W − 1 matter.
      state: (B, H, P, N) float32.
    """

    conv: jax.Array
    state: jax.Array

    def advance(
        self, memory: "MambaMemory", lengths: Int[Array, " B"], chunk_size: int, backends: kernels.Backends
    ) -> "MambaCache":
        """The cache after the first `lengths` (B,) of the tokens of `memory`, which were read after this cache."""
        kept = (jnp.arange(memory.dt.shape[1]) < lengths[:, None])[..., None]
        dt, log_decay = (jnp.where(kept, v, 0.0) for v in (memory.dt, memory.log_decay))
        # The output is not wanted, so that it does not matter what takes the place of C.
        _, state = kernels.ssd(
            *(memory.x, dt, log_decay, memory.b, memory.b),
            initial_state=self.state,
            chunk_size=chunk_size,
            implementation=backends.ssd,
        )
        return MambaCache(conv=_last_inputs(self.conv, memory.conv_input, lengths), state=state)


@flax.struct.dataclass
class MambaMemory:
    """What a Mamba-2 layer of the context offers the denoiser for a whole sequence: everything before any position.

    Attributes:
      conv_input: (B, L, C), raw. x: (B, L, H, P). b: (B, L, G, N). dt, log_decay: (B, L, H) float32.
      end: the cache after the last token; None where it is not wanted, or sequences are divided over devices.
      before: with sequences divided into n parts, the state before each, (n, B, H, P, N) float32; else None.
    """

    conv_input: jax.Array
    x: jax.Array
    b: jax.Array
    dt: jax.Array
    log_decay: jax.Array
    end: MambaCache | None
    before: jax.Array | None


class _Core(NamedTuple):
    """The parameters between the two projections, as one device has them: its channels and heads."""

    weights: BlockWeights
    a_log: jax.Array
    dt_bias: jax.Array


# A log-decay whose exponential is 0 in float32: what forgets everything.
_EVERYTHING = -1e4

# Logical axes, for `sharding.local`.
_TOKENS = ("batch", "length", "mamba_inner")
_HEADS = ("batch", "length", "mamba_heads")
_STATE = ("batch", "mamba_heads", None, None)
_CORE_AXES = _Core(
    weights=BlockWeights(
        conv_weight=(None, "mamba_inner"),
        conv_bias=("mamba_inner",),
        skip=("mamba_heads",),
        norm=("mamba_inner",),
    ),
    a_log=("mamba_heads",),
    dt_bias=("mamba_heads",),
)
_BEFORE = ("batch", "length")
_CACHE_AXES = MambaCache(conv=("batch", None, "mamba_inner"), state=_STATE)


def _memory_axes(end: bool = True) -> MambaMemory:
    divided = sequence_parallel.divided()
    return MambaMemory(
        conv_input=_TOKENS,
        x=(*_HEADS, None),
        b=(*_HEADS, None),
        dt=_HEADS,
        log_decay=_HEADS,
        end=_CACHE_AXES if end and not divided else None,
        before=("shard", *_STATE) if divided else None,
    )


class Mamba(Mixer):
    cache_axes = _CACHE_AXES

    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
        bidirectional: bool = False,
    ):
        self.config = config
        self.backends = backends
        self.bidirectional = bidirectional
        c = config
        inner, channels, heads = c.mamba_inner, c.conv_channels, c.mamba_num_heads
        std = c.initializer_range
        out_std = std / math.sqrt(c.num_hidden_layers) if c.rescale_prenorm_residual else std
        self.in_proj = Linear(
            scope.child("in_proj"),
            (c.hidden_size, inner + channels + heads),
            ("embed", "mamba_in"),
            normal(std),
            c.use_bias,
        )
        limit = 1 / math.sqrt(c.conv_kernel)
        conv = scope.child("conv1d")
        self.conv_weight = conv.declare(
            "weight", (c.conv_kernel, channels), (None, "mamba_inner"), uniform(limit), layout=CONV
        )
        self.conv_bias = (
            conv.declare("bias", (channels,), ("mamba_inner",), uniform(limit), decay=False)
            if c.use_conv_bias
            else None
        )
        self.A_log = scope.declare("A_log", (heads,), ("mamba_heads",), _init_a_log, decay=False, float32=True)
        self.D = scope.declare("D", (heads,), ("mamba_heads",), constant(1.0), decay=False, float32=True)
        self.dt_bias = scope.declare(
            "dt_bias", (heads,), ("mamba_heads",), _init_dt_bias(config), decay=False, float32=True
        )
        self.norm_weight = scope.child("norm").declare("weight", (inner,), ("mamba_inner",), constant(1.0), decay=False)
        self.out_proj = Linear(
            scope.child("out_proj"), (inner, c.hidden_size), ("mamba_inner", "embed"), normal(out_std), c.use_bias
        )

    def causal(
        self,
        x: Float[Array, "B L D"],
        cache: MambaCache | None = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], MambaMemory]:
        """One run of tokens x (B, L, D) after `cache`; None for the start of a text.

        Returns:
          (B, L, D) and the memory, its `end` being the cache after the real tokens.
        """
        lengths, document_start, end = run.lengths, run.document_start, run.end
        optional = zip((_CACHE_AXES, ("batch",), _BEFORE), (cache, lengths, document_start), strict=True)
        axes = (_TOKENS, *(None if given is None else axes for axes, given in optional), _CORE_AXES)
        core = sharding.local(functools.partial(self._causal, end=end), axes, (_TOKENS, _memory_axes(end)))
        y, memory = core(self._project(x), cache, lengths, _tokens_before(document_start), self._core())
        return self.out_proj(y), memory

    def _causal(self, projected, cache, lengths, before, core, end):
        z, conv_input, dt, log_decay = self._split_projected(projected, core, lengths)
        log_decay = _forget(log_decay, before)
        divided = sequence_parallel.divided()
        if divided and (cache is not None or lengths is not None):
            raise ValueError("caches and padding need a mesh with sequence=1: only training divides sequences")
        tail, state = self._start(conv_input, divided) if cache is None else (cache.conv, cache.state)
        xs, b, c = self._convolve(conv_input, core, tail, before)
        memory = MambaMemory(conv_input=conv_input, x=xs, b=b, dt=dt, log_decay=log_decay, end=None, before=None)
        if state is not None and before is None and z.shape[1] <= LONGEST_BLOCK:
            # Convolves once more, inside; what the memory has of it is computed only where somebody reads that.
            y, state = self._block_scan(z, conv_input, dt, log_decay, core, tail, state, next_state=end)
        else:
            y, state = self._scan(xs, dt, log_decay, b, c, state)
            if divided:
                seed = sequence_parallel.state_before(state, log_decay)
                y += sequence_parallel.from_state(c, seed, jnp.cumsum(log_decay, axis=1))
                memory = memory.replace(before=seed[None])
            y = self._gated_norm(add_skip(y, xs, core.weights.skip), z, core)
        if end and not divided:
            memory = memory.replace(end=MambaCache(conv=_last_inputs(tail, conv_input, lengths), state=state))
        return y, memory

    def _start(self, conv_input, divided):
        """The inputs before a text, or before this device's part of it, and no state."""
        width = self.config.conv_kernel
        if divided:
            return sequence_parallel.inputs_before(conv_input, width), None
        return jnp.zeros((conv_input.shape[0], width, conv_input.shape[-1]), conv_input.dtype), None

    def blockwise(
        self,
        x: Float[Array, "B L D"],
        memory: MambaMemory | MambaCache,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], None]:
        """Blocks of S tokens side by side, each seeded with the context's state at its left edge.

        Args:
          x: (B, L, D); with a cache for memory, L is S.
          memory: of the context's layer at the same depth.

        Returns:
          (B, L, D)
        """
        memory_axes = _CACHE_AXES if isinstance(memory, MambaCache) else _memory_axes()

        def blocks(projected, memory, before, core):
            return self._blockwise(projected, memory, before, core, block_size)

        axes = (_TOKENS, memory_axes, None if run.document_start is None else _BEFORE, _CORE_AXES)
        core = sharding.local(blocks, axes, _TOKENS)
        y = core(self._project(x), memory, _tokens_before(run.document_start), self._core())
        return self.out_proj(y), None

    def _blockwise(self, projected, memory, before, core, block_size):
        z, conv_input, dt, log_decay = self._split_projected(projected, core)
        skip = core.weights.skip
        if isinstance(memory, MambaCache):
            if not self.bidirectional and block_size <= LONGEST_BLOCK:
                return self._block_scan(z, conv_input, dt, log_decay, core, memory.conv, memory.state)[0]
            xs, b, c = self._convolve(conv_input, core, memory.conv)
            y, _ = self._scan(xs, dt, log_decay, b, c, memory.state)
        else:
            divided = sequence_parallel.divided()
            tail = sequence_parallel.inputs_before(memory.conv_input, self.config.conv_kernel) if divided else None
            conv = core.weights.conv_weight, core.weights.conv_bias
            xbc = kernels.block_causal_conv(
                conv_input, memory.conv_input, *conv, block_size, tail, before, implementation=self.backends.causal_conv
            )
            xs, b, c = self._split(xbc, core)
            forward_decay = _forget(log_decay, before)
            y = kernels.two_tower_ssd(
                *(xs, dt, forward_decay, b, c),
                *(memory.x, memory.dt, memory.log_decay, memory.b),
                block_size=block_size,
                chunk_size=self.config.chunk_size,
                implementation=self.backends.two_tower_ssd,
            )
            if divided:
                decay = _decay_through_context(forward_decay, memory.log_decay, block_size)
                y += sequence_parallel.from_state(c, memory.before[0], decay)
        y = add_skip(y, xs, skip)
        if self.bidirectional:
            y = (y + self._reversed(conv_input, dt, log_decay, core, block_size)) / 2
        return self._gated_norm(y, z, core)

    @classmethod
    def cache_shapes(cls, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> MambaCache:
        state = (batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        return MambaCache(
            conv=jax.ShapeDtypeStruct((batch, config.conv_kernel, config.conv_channels), dtype),
            state=jax.ShapeDtypeStruct(state, jnp.float32),
        )

    def keep(
        self, cache: MambaCache, memory: MambaMemory, before: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> MambaCache:
        """The state is advanced again from what was projected, with step size 0 after the kept tokens."""
        return cache.advance(memory, lengths, self.config.chunk_size, self.backends)

    def published_cache(self, cache: MambaCache) -> dict[str, jax.Array]:
        """conv (B, C, W), ssm (B, H, P, N)."""
        return {"conv": jnp.swapaxes(cache.conv, 1, 2), "ssm": cache.state}

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        require_positive(
            *(config, "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size")
        )
        if config.conv_kernel < 2:
            raise ValueError(f"conv_kernel={config.conv_kernel} must be at least 2: it reaches back in time")
        require_divides(config, "n_groups", "mamba_num_heads")

    @classmethod
    def check_mesh(cls, config: ModelConfig, shape: sharding.MeshShape, sequence_length: int) -> None:
        if shape.sequence > 1 and sequence_length // shape.sequence < config.conv_kernel:
            raise ValueError(f"mesh: sequence={shape.sequence} leaves a device fewer than {config.conv_kernel} tokens")
        sharding.check_divides(sharding.TENSOR, shape.tensor, config.n_groups, "n_groups")

    @classmethod
    def flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        width, inner = config.hidden_size, config.mamba_inner
        projections = 2 * width * (inner + config.conv_channels + config.mamba_num_heads) + 2 * inner * width
        return projections + cls.kernel_flops(config, keys, scans)

    @classmethod
    def kernel_flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        convolution = 2 * config.conv_kernel * config.conv_channels
        return scans * (convolution + 4 * config.mamba_inner * config.ssm_state_size)

    @classmethod
    def infer(cls, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
        if "A_log" not in shapes:
            return None
        heads, inner = shapes["A_log"][0], shapes["out_proj.weight"][1]
        channels, _, width = shapes["conv1d.weight"]
        return {
            "mamba_num_heads": heads,
            "mamba_head_dim": inner // heads,
            "conv_kernel": width,
            "n_groups": 1,
            "ssm_state_size": (channels - inner) // 2,
            "use_conv_bias": "conv1d.bias" in shapes,
            "use_bias": "in_proj.bias" in shapes,
        }

    def _project(self, x):
        """in_proj, its columns device by device: each device's share of z, x, B, C and dt side by side."""
        c = self.config
        bc = c.n_groups * c.ssm_state_size
        arrange = _by_device(c.mamba_inner, c.mamba_inner, bc, bc, c.mamba_num_heads)
        return self.in_proj(x, arrange)

    def _core(self):
        c = self.config
        bc = c.n_groups * c.ssm_state_size
        arrange = _by_device(c.mamba_inner, bc, bc)
        weights = BlockWeights(
            conv_weight=arrange(use(self.conv_weight)),
            conv_bias=None if self.conv_bias is None else arrange(use(self.conv_bias)),
            skip=use(self.D, jnp.float32),
            norm=use(self.norm_weight),
        )
        return _Core(weights, a_log=use(self.A_log, jnp.float32), dt_bias=use(self.dt_bias, jnp.float32))

    # From here on everything is one device's own: its rows and positions, and H heads of G groups, which may be fewer
    # than the model's.

    def _split_projected(self, projected, core, lengths=None):
        """The parts of in_proj: z (B, L, H·P), raw xBC (B, L, C), dt and dt·A (B, L, H) float32."""
        inner, channels = core.weights.norm.shape[0], core.weights.conv_weight.shape[1]
        z, conv_input, dt = jnp.split(projected, [inner, inner + channels], axis=-1)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + core.dt_bias)
        if self.config.time_step_limit is not None:
            dt = jnp.clip(dt, *self.config.time_step_limit)
        if lengths is not None:
            dt = jnp.where(jnp.arange(dt.shape[1])[:, None] < lengths[:, None, None], dt, 0.0)
        return z, conv_input, dt, -dt * jnp.exp(core.a_log)

    def _block_scan(self, z, conv_input, dt, log_decay, core, tail, state, next_state=False):
        """All between the projections for a block of few tokens after a cache: (B, S, H·P) and the state or None."""
        return kernels.block_scan(
            *(z, conv_input, dt, log_decay, core.weights, tail, state),
            **self._norm(core),
            next_state=next_state,
            implementation=self.backends.block_scan,
        )

    def _scan(self, xs, dt, log_decay, b, c, state):
        """y and the last state, from `state` or zeros."""
        return kernels.ssd(
            *(xs, dt, log_decay, b, c),
            initial_state=state,
            chunk_size=self.config.chunk_size,
            implementation=self.backends.ssd,
        )

    def _convolve(self, conv_input, core, tail, before=None):
        conv = core.weights.conv_weight, core.weights.conv_bias
        xbc = kernels.causal_conv(conv_input, *conv, tail, before, implementation=self.backends.causal_conv)
        return self._split(xbc, core)

    def _split(self, xbc, core):
        """x (B, L, H, P), B and C (B, L, G, N)."""
        c = self.config
        return split_channels(xbc, core.weights.norm.shape[0], c.mamba_head_dim, c.ssm_state_size)

    def _reversed(self, conv_input, dt, log_decay, core, block_size):
        """The scan of every block from its right end, from zeros, in the block's own order."""

        def flip(v):
            return jnp.flip(v.reshape(-1, block_size, *v.shape[2:]), axis=1)

        xs, b, c = self._convolve(flip(conv_input), core, None)
        y, _ = self._scan(xs, flip(dt), flip(log_decay), b, c, None)
        return jnp.flip(add_skip(y, xs, core.weights.skip), axis=1).reshape(*dt.shape, -1)

    def _norm(self, core):
        """The norm's epsilon and its groups on this device."""
        groups = core.a_log.shape[0] * self.config.n_groups // self.config.mamba_num_heads
        return {"epsilon": self.config.layer_norm_epsilon, "groups": groups}

    def _gated_norm(self, y, z, core):
        return gated_norm(y, z, core.weights.norm, **self._norm(core))


def _tokens_before(document_start: jax.Array | None) -> jax.Array | None:
    """How many tokens of its document lie before each position, (B, L) int32."""
    return None if document_start is None else jnp.arange(document_start.shape[1]) - document_start


def _forget(log_decay: jax.Array, before: jax.Array | None) -> jax.Array:
    """(B, L, H) log-decays with which the first token of a document forgets all that was."""
    return log_decay if before is None else jnp.where((before == 0)[..., None], _EVERYTHING, log_decay)


def _decay_through_context(log_decay: jax.Array, context_log_decay: jax.Array, block_size: int) -> jax.Array:
    """Log-decay from the left end of (B, L, H) to each position: the context's up to the block, then its own."""
    in_blocks = log_decay.reshape(log_decay.shape[0], -1, block_size, log_decay.shape[2])
    context = jnp.cumsum(context_log_decay, axis=1)[:, block_size - 1 :: block_size]
    before = jnp.pad(context[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return (jnp.cumsum(in_blocks, axis=2) + before[:, :, None]).reshape(log_decay.shape)


def _by_device(*widths: int) -> Callable[[jax.Array], jax.Array]:
    """Reorders columns of parts of these widths so that a device along "tensor" has an equal share of every part."""
    shards = sharding.shards(sharding.TENSOR)

    def arrange(columns):
        if shards == 1:
            return columns
        parts = jnp.split(columns, np.cumsum(widths)[:-1], axis=-1)
        leading = columns.shape[:-1]
        shares = [part.reshape(*leading, shards, part.shape[-1] // shards) for part in parts]
        columns = jnp.concatenate(shares, axis=-1).reshape(columns.shape)
        return sharding.constrain(columns, (*(None,) * len(leading), "mamba_inner"))

    return arrange


def _last_inputs(before: jax.Array, new: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The last W of the inputs (B, W, C) before and (B, L, C) new, of which each row has `lengths` real ones."""
    width = before.shape[1]
    inputs = jnp.concatenate([before, new.astype(before.dtype)], axis=1)
    if lengths is None:
        return inputs[:, -width:]
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width))(inputs, lengths)


def _init_a_log(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A = −1, …, −H over the heads, as the published code starts."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def _init_dt_bias(config: ModelConfig):
    """Log-uniform step sizes in [time_step_min, time_step_max], through the inverse of softplus."""

    def init(key, shape):
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        dt = jnp.maximum(dt, config.time_step_floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init
