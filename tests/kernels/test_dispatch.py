"""Which implementation of an op runs: kernels/dispatch.py; and that kernels lower for the chips they are made for."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from twotower_jax import kernels
from twotower_jax.kernels.ssd import triton as ssd_triton


def shapes(batch=1, length=512, heads=64, head_dim=64, groups=8, state=128, dtype=jnp.bfloat16):
    """Those of x, dt, log_decay, b, c."""
    group = jax.ShapeDtypeStruct((batch, length, groups, state), dtype)
    row = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    return jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype), row, row, group, group


def tpu(devices=1, axis_type=AxisType.Auto):
    """The mesh of chips that are not there."""
    device = AbstractDevice("TPU v5", 1, "tpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((devices,), ("device",), axis_types=(axis_type,), abstract_device=device)
    )


def gpu(kind="NVIDIA H200"):
    device = AbstractDevice(kind, 132, "gpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


def test_xla_is_chosen_where_nothing_is_made_for_the_platform():
    assert kernels.chosen("ssd", *shapes()) == ("xla", f"nothing is made for {jax.default_backend()}")


def test_the_tpu_kernels_are_chosen_on_a_tpu():
    with tpu():
        assert kernels.chosen("ssd", *shapes()).implementation == "pallas_tpu"
        both = *shapes(), *shapes()[:4]
        assert kernels.chosen("two_tower_ssd", *both, block_size=16).implementation == "pallas_tpu"


def test_mosaic_gpu_is_chosen_on_a_hopper_gpu_and_triton_on_others(monkeypatch):
    both = *shapes(), *shapes()[:4]
    with gpu():
        assert kernels.chosen("ssd", *shapes()) == ("mosaic_gpu", "made for gpu")
        assert kernels.chosen("two_tower_ssd", *both, block_size=16).implementation == "mosaic_gpu"
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"):
        with gpu(kind):
            assert kernels.chosen("ssd", *shapes()) == ("triton", "made for gpu")
            assert kernels.chosen("two_tower_ssd", *both, block_size=16).implementation == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with gpu(kind):
        choice = kernels.chosen("ssd", *shapes())
        assert choice.implementation == "xla"
        assert choice.reason.startswith("not mosaic_gpu: made for NVIDIA Hopper")
        assert choice.reason.endswith("not triton: jax-triton is not installed (pip install 'twotower_jax[cuda]')")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("7.5", "compute capability 8.0 and later"),
        ("8.0", None),
        ("12.1", None),
        ("gfx90a", "NVIDIA GPUs"),
        (None, None),
    ],
)
def test_triton_is_for_nvidia_gpus_from_ampere_on(capability, reason):
    problem = ssd_triton._too_old(capability)
    assert problem is None if reason is None else reason in problem


NANO_4B = {"heads": 96, "head_dim": 80}


def test_every_kernel_takes_the_shapes_of_nano_4b():
    """Heads of 80, chunks of 256, and attention of 40 heads on 8."""
    one = shapes(length=8192, **NANO_4B)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    row, inner, channels = shape(1, 16, 96, dtype=jnp.float32), 96 * 80, 96 * 80 + 2 * 8 * 128
    weights = kernels.BlockWeights(shape(4, channels), shape(channels), shape(96, dtype=jnp.float32), shape(inner))
    block = shape(1, 16, inner), shape(1, 16, channels), row, row, weights, shape(1, 4, channels)
    state = shape(1, 96, 80, 128, dtype=jnp.float32)
    key = shape(1, 8, 8192, 128)
    source = kernels.Keys(key, key, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    long = shape(1, 8192, channels)

    def chosen():
        yield kernels.chosen("ssd", *one, chunk_size=256)
        yield kernels.chosen("two_tower_ssd", *one, *one[:4], block_size=16, chunk_size=256)
        yield kernels.chosen("block_scan", *block, state, groups=8, epsilon=1e-5, next_state=True)
        yield kernels.chosen("causal_conv", long, weights.conv_weight, weights.conv_bias)
        yield kernels.chosen("block_causal_conv", long, long, weights.conv_weight, weights.conv_bias, 16)
        yield kernels.chosen("attention", shape(1, 8192, 40, 128), (source,))

    with tpu():
        assert {choice.implementation for choice in chosen()} == {"pallas_tpu"}
    with gpu():
        assert {choice.implementation for choice in chosen()} == {"mosaic_gpu"}
    with gpu("NVIDIA A100-SXM4-80GB"):
        assert [choice.implementation for choice in chosen()][:2] == ["triton"] * 2


def test_shapes_that_the_gpu_kernels_do_not_take_fall_to_xla_and_say_so():
    with gpu():
        choice = kernels.chosen("ssd", *shapes(head_dim=96))
        assert choice.implementation == "xla"
        assert choice.reason.startswith("not mosaic_gpu: heads of 96 with a state of 128")
        both = *shapes(length=4320), *shapes(length=4320)[:4]
        choice = kernels.chosen("two_tower_ssd", *both, block_size=27)
        reason = "a chunk of 1728 positions is longer than 256"
        assert choice == ("xla", f"not mosaic_gpu: {reason}; not triton: {reason}")


@pytest.mark.parametrize(
    "odd",
    [{"heads": 3, "groups": 3}, {"state": 100}, {"head_dim": 8, "heads": 16}],
    ids=lambda odd: ",".join(f"{k}={v}" for k, v in odd.items()),
)
def test_shapes_that_the_kernels_cannot_cut_fall_to_xla_and_say_so(odd):
    with tpu():
        choice = kernels.chosen("ssd", *shapes(**odd))
        assert choice.implementation == "xla"
        assert choice.reason.startswith("not pallas_tpu: ")
        with pytest.raises(ValueError, match="ssd cannot run as 'pallas_tpu': .* cannot be cut into blocks"):
            kernels.chosen("ssd", *shapes(**odd), implementation="pallas_tpu")


def test_a_block_that_no_chunk_holds_falls_to_xla():
    with tpu():
        both = *shapes(length=4320), *shapes(length=4320)[:4]
        choice = kernels.chosen("two_tower_ssd", *both, block_size=27)  # The least common multiple with 128 is 3456.
        assert choice == ("xla", "not pallas_tpu: a chunk of 3456 positions is longer than 256")


def test_no_kernel_is_chosen_where_xla_would_have_to_divide_it():
    with tpu(devices=4):
        assert kernels.chosen("ssd", *shapes()) == ("xla", "not pallas_tpu: several devices outside of shard_map")
    with tpu(devices=4, axis_type=AxisType.Manual):
        assert kernels.chosen("ssd", *shapes()).implementation == "pallas_tpu"


def test_a_name_runs_or_raises():
    x, dt, log_decay, b, c = (jnp.zeros(v.shape, v.dtype) for v in shapes(length=16))
    with pytest.raises(ValueError, match="ssd has no implementation 'cudnn'; there are xla, pallas_tpu, "):
        kernels.ssd(x, dt, log_decay, b, c, implementation="cudnn")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="ssd cannot run as 'pallas_tpu': made for tpu, and this is cpu"):
            kernels.ssd(x, dt, log_decay, b, c, implementation="pallas_tpu")
        with pytest.raises(ValueError, match="ssd cannot run as 'triton': made for NVIDIA GPUs, not for cpu"):
            kernels.ssd(x, dt, log_decay, b, c, implementation="triton")


def test_every_implementation_is_one_that_loads():
    everywhere = {"xla", "pallas_tpu", "pallas_tpu_interpret", "mosaic_gpu", "mosaic_gpu_interpret"}
    for op in kernels.OPS.values():
        assert everywhere <= set(op.implementations)
        for name in op.implementations:
            assert callable(op.load(name))
    assert kernels.implementations("no such op") == ()
    with pytest.raises(KeyError):
        kernels.chosen("no such op")


def lowered_for_tpu(function, *arguments):
    with tpu():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def kernels_in(function, *arguments):
    """How many kernels a function lowers to for a TPU."""
    return lowered_for_tpu(function, *arguments).count("tpu_custom_call")


def gpu_kernels_in(function, *arguments):
    with gpu():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("@mosaic_gpu_v2")


@pytest.mark.parametrize("length", [1, 16, 100, 8192], ids=lambda v: f"L{v}")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_ssd_lowers_for_a_tpu_at_the_shapes_of_the_30b_model(length, dtype):
    def loss(*arrays):
        y, last = kernels.ssd(*arrays, chunk_size=128)
        return jnp.sum(y) + jnp.sum(last)

    assert kernels_in(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *shapes(length=length, dtype=dtype)) == 2


def test_the_scans_of_nano_4b_lower_for_a_tpu():
    def loss(*arrays):
        return jnp.sum(kernels.two_tower_ssd(*arrays, block_size=16, chunk_size=256))

    one = shapes(length=512, **NANO_4B)
    assert kernels_in(jax.grad(loss, argnums=tuple(range(9))), *one, *one[:4]) == 2


@pytest.mark.whole
def test_the_scan_of_nano_4b_lowers_for_a_hopper_gpu():
    def loss(*arrays):
        y, last = kernels.ssd(*arrays, chunk_size=256)
        return jnp.sum(jnp.square(y)) + jnp.sum(last)

    assert gpu_kernels_in(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *shapes(**NANO_4B)) == 6


@pytest.mark.whole
@pytest.mark.parametrize(("length", "dtype"), [(8192, jnp.bfloat16), (8192, jnp.float32), (16, jnp.bfloat16)], ids=str)
def test_ssd_lowers_for_a_hopper_gpu_at_the_shapes_of_the_30b_model(length, dtype):
    def loss(*arrays):
        y, last = kernels.ssd(*arrays, chunk_size=128)
        return jnp.sum(jnp.square(y)) + jnp.sum(last)

    assert gpu_kernels_in(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *shapes(length=length, dtype=dtype)) == 6


@pytest.mark.whole
@pytest.mark.parametrize(("block_size", "arrays", "count"), [(16, 9, 8), (16, 5, 5), (48, 9, 8)])
def test_two_tower_ssd_lowers_for_a_hopper_gpu_at_the_shapes_of_the_30b_model(block_size, arrays, count):
    """With the context's gradients and, where it is frozen, without the three kernels of them."""

    def loss(*arrays):
        return jnp.sum(jnp.square(kernels.two_tower_ssd(*arrays, block_size=block_size)))

    both = *shapes(length=6144), *shapes(length=6144)[:4]
    assert gpu_kernels_in(jax.grad(loss, argnums=tuple(range(arrays))), *both) == count


@pytest.mark.parametrize("block_size", [4, 16, 64, 128])
def test_two_tower_ssd_lowers_for_a_tpu_at_the_shapes_of_the_30b_model(block_size):
    def loss(*arrays):
        return jnp.sum(kernels.two_tower_ssd(*arrays, block_size=block_size))

    both = *shapes(length=8192), *shapes(length=8192)[:4]
    assert kernels_in(jax.grad(loss, argnums=tuple(range(9))), *both) == 2


@pytest.mark.parametrize(("length", "next_state"), [(1, True), (16, False), (64, True)])
def test_block_scan_lowers_for_a_tpu_at_the_shapes_of_the_30b_model(length, next_state):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    row = shape(2, length, 64, dtype=jnp.float32)
    weights = kernels.BlockWeights(shape(4, 6144), shape(6144), shape(64, dtype=jnp.float32), shape(4096))
    arguments = shape(2, length, 4096), shape(2, length, 6144), row, row, weights, shape(2, 4, 6144)
    state = shape(2, 64, 64, 128, dtype=jnp.float32)

    def run(*arguments):
        return kernels.block_scan(*arguments, groups=8, epsilon=1e-5, next_state=next_state)

    assert kernels_in(run, *arguments, state) == 1


def keys_after(length, keys, dtype=jnp.bfloat16, head_dim=128):
    """Arguments of `attention` at the shapes of the 30B model: queries, and a source of keys."""
    shape = jax.ShapeDtypeStruct((1, 2, keys, head_dim), dtype)
    source = kernels.Keys(shape, shape, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return jax.ShapeDtypeStruct((1, length, 32, head_dim), dtype), (source,)


def hopper(kind="NVIDIA H200"):
    mesh = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice(kind, None, "gpu"))
    return jax.sharding.use_abstract_mesh(mesh)


def test_attention_is_chosen_by_platform_and_arrays():
    with tpu():
        for dtype in (jnp.bfloat16, jnp.float32):
            assert kernels.chosen("attention", *keys_after(16, 8192, dtype)).implementation == "pallas_tpu"
        few = kernels.chosen("attention", *keys_after(16, 128))
        assert few == ("xla", "not pallas_tpu: no source has more than 128 keys, which XLA does as well")
        odd = kernels.chosen("attention", *keys_after(16, 8192, head_dim=80))
        assert odd == ("xla", "not pallas_tpu: the head dim 80 is not a multiple of 128")
        q, (source,) = keys_after(1980, 1980)
        long = kernels.chosen("attention", q, (source,), own_block=(source.key, source.key), block_size=198)
        assert long == ("xla", "not pallas_tpu: blocks of 198 make tiles of 1584 positions, more than 1024")
    with hopper():
        assert kernels.chosen("attention", *keys_after(16, 8192)).implementation == "mosaic_gpu"
        exact = kernels.chosen("attention", *keys_after(16, 8192, jnp.float32))
        assert exact == ("xla", "not mosaic_gpu: queries are float32: the tensor core multiplies bfloat16")
    with hopper("NVIDIA A100-SXM4-80GB"):
        assert kernels.chosen("attention", *keys_after(16, 8192)).reason.startswith("not mosaic_gpu: made for")


def test_attention_lowers_for_a_tpu_at_the_shapes_of_the_30b_model():
    def loss(q, key, value, *own):
        context = kernels.Keys(key, value, jnp.arange(q.shape[1]) // 16 * 16)
        y = kernels.attention(q, (context,), own_block=own, block_size=16)
        return jnp.sum(y.astype(jnp.float32))

    q, (source,) = keys_after(8192, 8192)
    arrays = (q, *[source.key] * 4)
    assert kernels_in(loss, *arrays) == 1
    assert kernels_in(jax.grad(loss, argnums=tuple(range(5))), *arrays) == 3


def test_attention_turns_no_queries_around():
    """Nothing larger than keys is transposed for a TPU, forward or backward: heads stay side by side."""

    def loss(q, key, value, *own):
        q, *keys = (v.reshape(*v.shape[:2], -1, 128) for v in (q, key, value, *own))
        key, value, *own = (jnp.swapaxes(v, 1, 2) for v in keys)
        context = kernels.Keys(key, value, jnp.arange(q.shape[1]) // 16 * 16)
        y = kernels.attention(q, (context,), own_block=tuple(own), block_size=16)
        return jnp.sum(y.astype(jnp.float32))

    q, key = (jax.ShapeDtypeStruct((1, 8192, width), jnp.bfloat16) for width in (32 * 128, 2 * 128))
    text = lowered_for_tpu(jax.grad(loss, argnums=tuple(range(5))), q, *[key] * 4)
    shapes = re.findall(r"stablehlo\.transpose .*-> tensor<([\dx]+)x\w+>", text)
    assert shapes and max(math.prod(map(int, shape.split("x"))) for shape in shapes) == math.prod(key.shape)
