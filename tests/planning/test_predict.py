"""planning/predict.py against counts by hand: products in a loop, collectives of eight devices, and what is hidden."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hlo import ragged_product
from twotower_jax.planning import report
from twotower_jax.planning.hardware import Hardware
from twotower_jax.planning.plan import plan_step
from twotower_jax.planning.predict import predict
from twotower_jax.planning.rates import RATES, Rates
from twotower_jax.sharding import MeshShape, make_mesh

PEAK = 1e12
RING = Rates(memory=1e11, link=1e10)


def test_products_in_a_loop_count_once_a_trip():
    """Five times 2 · 64 · 128 · 32 operations and those of 64 · 32 · 128."""

    def function(x, v, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ v) @ w, None), x, None, length=5)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 32), (32, 128))]
    found = predict(jax.jit(function).lower(*shapes).compile().as_text(), RING, PEAK)
    assert found.flops == 5 * 2 * (2 * 64 * 128 * 32)
    # Both matrices, the activations read by each product, and what each writes; little else.
    least = 5 * 4 * (2 * 128 * 32 + 2 * 64 * 128 + 2 * 64 * 32)
    assert least <= found.bytes < 2 * least
    assert found.link_bytes == {} and found.uncounted == {}
    assert found.seconds >= max(found.flops / PEAK, found.bytes / RING.memory)


@pytest.mark.parametrize(
    ("specs", "out", "kind", "sent"),
    [
        # A sum of (64, 256) float32 over eight devices: twice seven eighths of it.
        (((None, "fsdp"), ("fsdp", None)), (), "all-reduce", 2 * 7 / 8 * 4 * 64 * 256),
        # A matrix (128, 256) in eighths, gathered: the seven others.
        ((("fsdp", None), ("fsdp", None)), ("fsdp", None), "all-gather", 7 / 8 * 4 * 128 * 256),
    ],
)
def test_collectives_over_eight_devices(specs, out, kind, sent):
    mesh = make_mesh(MeshShape(fsdp=8), jax.devices())
    places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (*specs, out)]
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(((64, 128), (128, 256)), places, strict=False)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jnp.matmul, out_shardings=places[-1]).lower(*shapes).compile()
    found = predict(compiled.as_text(), RING, PEAK)
    assert found.link_bytes == {kind: sent}
    assert found.flops == 2 * 64 * 128 * 256 / 8
    assert found.exposed == pytest.approx(sent / RING.link) and found.hidden == 0
    assert found.limit == "links"


ASYNC = """
%fused (a: bf16[1000,1000], b: bf16[1000,1000]) -> bf16[1000,1000] {
  %a = bf16[1000,1000]{1,0} parameter(0)
  %b = bf16[1000,1000]{1,0} parameter(1)
  ROOT %d = bf16[1000,1000]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cut (a: bf16[50,1000,1000], i: s32[]) -> bf16[1000,1000] {
  %a = bf16[50,1000,1000]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = bf16[1,1000,1000]{2,1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,1000,1000}
}

ENTRY %main (x: bf16[1000,1000], s: bf16[50,1000,1000], i: s32[]) -> bf16[4000,1000] {
  %x = bf16[1000,1000]{1,0} parameter(0)
  %s = bf16[50,1000,1000]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = (bf16[1000,1000], bf16[4000,1000]) all-gather-start(%x), replica_groups=[16,4]<=[64], dimensions={0}
  MIDDLE
  ROOT %done = bf16[4000,1000]{1,0} all-gather-done(%start)
}
"""


@pytest.mark.parametrize(
    ("middle", "meanwhile"),
    [
        ("", 0.0),
        ("%p = bf16[1000,1000]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused", 2e9 / 1e12),
        # A slice of a stack is read and written, and not the stack.
        ("%p = bf16[1,1000,1000]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%cut", (2 * 2e6 + 4) / 1e11),
        ("%p = bf16[1000,1000]{1,0} copy(%x)", 2 * 2e6 / 1e11),
    ],
)
def test_what_is_hidden_of_a_collective(middle, meanwhile):
    """Three times 2 MB over a link of 10 GB/s: 0.6 ms, but for what is done between its beginning and its end."""
    found = predict(ASYNC.replace("MIDDLE", middle), RING, PEAK)
    assert found.link_bytes == {"all-gather": 6e6}
    assert found.hidden == pytest.approx(min(meanwhile, 6e-4))
    assert found.hidden + found.exposed == pytest.approx(6e-4)
    assert found.seconds == pytest.approx(max(6e-4, meanwhile))


@pytest.mark.parametrize(
    ("middle", "seconds"),
    [
        # 2 MB into memory on the chip take 20 µs to read, and the product there 2 ms: nothing of the copy is left over.
        ("%p = bf16[1000,1000]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused", 2e-3),
        # What is written on the chip takes no time of the memory's, nor does what is copied from there.
        ("%p = bf16[1000,1000]{1,0:T(8,128)(2,1)S(1)} copy(%x)", 2e6 / 1e11 + 2e6 / 1e11),
        ("", 2e6 / 1e11),
    ],
)
def test_a_copy_that_goes_on_beside_other_work(middle, seconds):
    gather = "%start = (bf16[1000,1000], bf16[4000,1000]) all-gather-start(%x), replica_groups=[16,4]<=[64]"
    copy = "%begun = (bf16[1000,1000]{1,0:T(8,128)(2,1)S(1)}, bf16[1000,1000]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"
    text = ASYNC.replace(f"{gather}, dimensions={{0}}", f"{copy} copy-start(%x)").replace("MIDDLE", middle)
    text = text.replace(
        "%done = bf16[4000,1000]{1,0} all-gather-done(%start)", "%done = bf16[1000,1000] copy-done(%begun)"
    )
    found = predict(text, RING, PEAK)
    assert found.seconds == pytest.approx(seconds)
    assert found.link_bytes == {} and found.bytes >= 2e6


def convolution(given, kernel, out, attributes):
    shapes = given, kernel, out
    given, kernel, out = (f"f32[{','.join(map(str, shape))}]{{0}}" for shape in shapes)
    return f"""
ENTRY %main (a: {given}, b: {kernel}) -> {out} {{
  %a = {given} parameter(0)
  %b = {kernel} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("shapes", "attributes", "products"),
    [
        # A batch of 8 products of 5 × 3 with 3 × 7, as a TPU writes it: the window meets one number in eight.
        (((8, 5, 3), (8, 3, 7), (8, 5, 7)), "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf", 8 * 105),
        # As it writes the nine matrices that one multiplies, each output with one place of a window full of padding.
        (((5, 3, 1), (7, 3, 9), (5, 7, 9)), "window={size=9 pad=8_8 rhs_reversal=1}, dim_labels=bf0_oi0->bf0", 9 * 105),
        (((6, 3), (3, 7), (6, 7)), "dim_labels=bf_io->bf", 6 * 3 * 7),
        # Four causal places for each of 10 positions, but for 1, 2 and 3 before the beginning. A group is a channel.
        (((2, 10, 6), (4, 1, 6), (2, 10, 6)), "window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, feature_group_count=6",
         2 * 6 * (4 * 10 - 6)),
        # Places two apart, of 9 positions: 5 outputs, or 9 with two zeros on each side.
        (((1, 9, 2), (3, 2, 3), (1, 5, 3)), "window={size=3 rhs_dilate=2}, dim_labels=b0f_0io->b0f", 5 * 3 * 2 * 3),
        (((1, 9, 2), (3, 2, 3), (1, 9, 3)), "window={size=3 pad=2_2 rhs_dilate=2}, dim_labels=b0f_0io->b0f",
         (7 + 9 + 7) * 2 * 3),
        # Two sides: 2 × 2 of 5 × 4 in steps of 2, and 3 × 3 with a frame of zeros, of which the corners have 4.
        (((1, 5, 4, 2), (2, 2, 2, 3), (1, 2, 2, 3)), "window={size=2x2 stride=2x2}, dim_labels=b01f_01io->b01f", 96),
        (((1, 3, 3, 1), (3, 3, 1, 1), (1, 3, 3, 1)), "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 49),
        # A group of the batch for each output, as in the gradient of a convolution by channel.
        (((6, 10, 2), (10, 2, 6), (1, 1, 6)), "window={size=10}, dim_labels=b0f_0io->b0f, batch_group_count=6", 120),
    ],
)  # fmt: skip
def test_convolutions_count_what_meets(shapes, attributes, products):
    """A number that is inserted or padded is multiplied by nobody who can help it."""
    assert predict(convolution(*shapes, attributes), RING, PEAK).flops == 2 * products


@pytest.mark.parametrize(("strides", "spread", "apart", "pad"), [((1, 2), (3, 1), (2, 1), ((4, -1), (0, 3)))])
def test_convolutions_as_a_loop_counts_them(strides, spread, apart, pad):
    given, kernel = (2, 7, 5, 3), (4, 2, 3, 6)
    out = jax.eval_shape(
        lambda a, b: jax.lax.conv_general_dilated(a, b, strides, pad, spread, apart, ("NHWC", "HWIO", "NHWC")),
        jax.ShapeDtypeStruct(given, jnp.float32),
        jax.ShapeDtypeStruct(kernel, jnp.float32),
    ).shape
    met = 0
    for here in np.ndindex(out[1:3]):
        for tap in np.ndindex(kernel[:2]):
            places = [here[d] * strides[d] + tap[d] * apart[d] - pad[d][0] for d in range(2)]
            met += all(0 <= p <= (given[1 + d] - 1) * spread[d] and p % spread[d] == 0 for d, p in enumerate(places))
    window = f"size=4x2 stride={strides[0]}x{strides[1]} pad=4_-1x0_3 lhs_dilate=3x1 rhs_dilate=2x1"
    text = convolution(given, kernel, out, f"window={{{window}}}, dim_labels=b01f_01io->b01f")
    assert predict(text, RING, PEAK).flops == 2 * 2 * 6 * 3 * met


def test_a_ragged_product_is_a_kernel():
    """As TPUs without a kernel for it write it: 8 groups with all 1000 rows, of which each is in one group."""
    text = ragged_product(8, 1000, 64, 32)
    known = predict(text, RING, PEAK, kernel_flops=2e9)
    assert known.flops == 2e9 and known.uncounted == {"kernels": 1}
    # The rows, the matrices and the mask are read, and the rows' products written.
    assert known.bytes == 2 * 1000 * 64 + 2 * 8 * 64 * 32 + 8 * 1000 + 2 * 1000 * 32
    dense = predict(text.replace("MODE_GROUP_STARTS", "MODE_UNSPECIFIED"), RING, PEAK, kernel_flops=2e9)
    assert dense.flops == 8 * 2 * 1000 * 64 * 32 and dense.uncounted == {}


def test_a_collective_on_a_core_of_its_own():
    """As tpu7x gathers, in a call in parts: 6 MB take 0.6 ms, which a product of 2 ms between hides whole."""
    there = """
%gathers (mine: bf16[1000,1000]) -> bf16[4000,1000] {
  %mine = bf16[1000,1000]{1,0} parameter(0)
  ROOT %gathered = bf16[4000,1000]{1,0} all-gather(%mine), replica_groups=[16,4]<=[64], dimensions={0}
}, execution_thread="sparsecore"
"""
    gather = "%start = (bf16[1000,1000], bf16[4000,1000]) all-gather-start(%x), replica_groups=[16,4]<=[64], "
    begun = "%start = ((), (), (s32[8]{0})) custom-call-start(), called_computations={%gathers}"
    more = "%more = ((bf16[1000,1000]), bf16[4000,1000]) custom-call-update(%start, %x)\n  MIDDLE"
    text = there + ASYNC.replace(f"{gather}dimensions={{0}}", begun).replace("MIDDLE", more)
    text = text.replace("all-gather-done(%start)", "custom-call-done(%more)")
    product = "%p = bf16[1000,1000]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused"
    alone, beside = (predict(text.replace("MIDDLE", middle), RING, PEAK) for middle in ("", product))
    assert alone.link_bytes == beside.link_bytes == {"all-gather": 6e6}
    assert (alone.hidden, alone.exposed) == (0, pytest.approx(6e-4))
    assert (beside.hidden, beside.exposed) == (pytest.approx(6e-4), 0)


LOOP = """
%below (t: (s32[], s32[], f32[4,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={op_name="while/cond"}
  %t = (s32[]{:T(128)}, s32[], f32[4,4]{1,0:T(4,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %other = s32[] get-tuple-element(%t), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %t = (s32[]{:T(128)}, s32[], f32[4,4]{1,0:T(4,128)}) parameter(0)
  %m = f32[4,4]{1,0} get-tuple-element(%t), index=2
  %d = f32[4,4]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], s32[], f32[4,4]) tuple(%i, %other, %d)
}

ENTRY %main (t: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %t = (s32[]{:T(128)}, s32[], f32[4,4]{1,0:T(4,128)}) parameter(0)
  ROOT %w = (s32[], s32[], f32[4,4]) while(%t), condition=%below, body=%body
}
"""


def test_trips_of_a_loop_as_its_condition_says():
    """TPUs' programs have no counts beside their loops. A bound that is computed is not known: once, and said."""
    known = predict(LOOP, RING, PEAK)
    assert known.flops == 7 * 2 * 4**3 and known.uncounted == {}
    unknown = predict(LOOP.replace("compare(%i, %limit)", "compare(%i, %other)"), RING, PEAK)
    assert unknown.flops == 2 * 4**3 and unknown.uncounted == {"loops": 1}


def test_only_kernels_hide_arithmetic():
    call = '%k = bf16[1000,1000]{1,0} custom-call(%x), custom_call_target="TARGET"'
    found = {
        t: predict(ASYNC.replace("MIDDLE", call.replace("TARGET", t)), RING, PEAK) for t in ("AllocateBuffer", "X")
    }
    assert [found[t].uncounted for t in found] == [{}, {}]
    assert found["AllocateBuffer"].bytes == 0 and found["X"].bytes == 4e6


def test_what_is_not_known_is_counted():
    text = ASYNC.replace("MIDDLE", '%k = bf16[1000,1000]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"')
    assert predict(text, RING, PEAK).uncounted == {"kernels": 1}
    with pytest.raises(ValueError, match="ENTRY"):
        predict("", RING, PEAK)


def test_what_a_kernel_computes_is_given():
    """It reads and writes 2 MB, in 40 µs; 20 GFLOP take 20 ms and cover the collective, 1 MFLOP takes no time."""
    text = ASYNC.replace("MIDDLE", '%k = bf16[1000,1000]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"')
    plain = predict(text, RING, PEAK)
    assert plain.kernel_traffic == plain.memory == pytest.approx(4e6 / 1e11)
    long = predict(text, RING, PEAK, kernel_flops=2e10)
    assert (long.flops, long.arithmetic, long.memory) == (2e10, 2e10 / PEAK, pytest.approx(0))
    assert predict(text, RING, PEAK, kernel_flops=1e6) == plain._replace(flops=1e6)
    assert predict(ASYNC.replace("MIDDLE", ""), RING, PEAK, kernel_flops=2e10).flops == 0


def test_far_links_are_slower():
    assert RATES["h200"].link_rate(8) == 9 * RATES["h200"].link_rate(16)
    assert RATES["v5p"].link_rate(8) == RATES["v5p"].link_rate(256)


def test_a_plan_says_how_long_and_why(step_config):
    """The train step of a small model, as if eight virtual CPUs were v5e chips."""
    config = step_config(**{"mesh.fsdp": 8, "vocab_size": 40})
    plan = plan_step(config, Hardware("v5e:cpu", jax.devices(), 8, 2**30, 197e12))
    found = plan.predicted
    assert found.flops >= plan.flops / 8
    assert found.link_bytes["all-gather"] > 0 and found.seconds > 0
    assert 0 < plan.predicted_utilization < 1
    text = report.describe(plan)
    assert f"limited by {found.limit}" in text and "GiB sent by each device" in text
    assert json.loads(json.dumps(report.as_json(plan)))["predicted"]["seconds"] == found.seconds
