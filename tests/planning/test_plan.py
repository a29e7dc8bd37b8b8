"""twotower_jax/planning: the real step compiled for devices that need not be there; here they are virtual CPUs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from helpers import ROOT, run_command
from hlo import ragged_product
from twotower_jax.parameters import Parameter, count, parameter_table
from twotower_jax.planning import checks, hardware, least, report, serving, table
from twotower_jax.planning.hardware import Hardware
from twotower_jax.planning.plan import compile_or_refuse, plan_step
from twotower_jax.sharding import MeshShape
from twotower_jax.train.flops import step_flops
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import tables
from twotower_jax.two_tower import TwoTower


def plan_for_eight(config):
    config = dataclasses.replace(config, mesh=MeshShape(fsdp=8), vocab_size=40)
    return plan_step(config, Hardware("cpu:8", jax.devices(), 8, 2**30, 1e12))


@pytest.fixture(scope="module")
def plan(step_config):
    return plan_for_eight(step_config())


@pytest.fixture(scope="module")
def plan_of_a_layer(step_config):
    """For what is done with any plan."""
    return plan_for_eight(step_config(**{"model.hybrid_override_pattern": "-", "model.intermediate_size": 32}))


@pytest.mark.whole
def test_bytes_by_kind(plan, step_config):
    """Matrices with a side of D = 16 in eighths, all else whole; the optimizer has two moments a weight, two counts."""
    trained, frozen = tables(make_objective(step_config(), step_config().model_config(40)))

    def on_a_device(parameters):
        eighths = {path: 8 if len(p.tensor_shape) > 1 and 16 in p.tensor_shape else 1 for path, p in parameters.items()}
        return sum(4 * math.prod(p.shape) // eighths[path] for path, p in parameters.items())

    assert plan.mesh == {"fsdp": 8}
    assert plan.weights == on_a_device(trained) + on_a_device(frozen)
    assert plan.optimizer == 2 * on_a_device(trained) + 2 * 4
    assert 0 < plan.activations < plan.memory
    assert plan.fits
    assert not plan._replace(memory=int(1.05 * plan.total)).fits
    assert plan._replace(memory=int(1.12 * plan.total)).fits


@pytest.mark.whole
def test_nothing_that_is_ruled_out(plan):
    assert not any(check.found for check in plan.gates)


@pytest.mark.whole
def test_the_report_says_it_all(plan):
    text = report.describe(plan)
    parts = "cpu:8: 8 chips, 8 devices, mesh fsdp 8", f"{plan.parameters:,} parameters", "fits", "chip-hours"
    for part in (*parts, checks.WEIGHT_COPIES):
        assert part in text
    assert "DOES NOT FIT" in report.describe(plan._replace(memory=plan.total))
    assert report.as_json(plan)["fits"] is True


def test_what_is_ruled_out_is_found(step_config):
    """States of 8 heads × 4 × 8 for each of the 64 blocks of 4 tokens; 256 tokens times 8 experts of width 24."""
    config = step_config()
    model = config.model_config(40)
    program = "a = f32[64,8,4,8]{3,2,1,0} b = f32[32,8,4,8] c = bf16[256,192] d = f32[256,24] e = s32[900,900]"
    assert checks.per_block_states(program, config, model, 4, MeshShape()).found == ["f32[64,8,4,8]"]
    assert checks.dense_experts(program, config, model, MeshShape()).found == ["bf16[256,192]"]


def test_a_product_of_all_experts_with_all_rows_is_found(step_config):
    """256 tokens with 3 choices each are 768 rows, 1152 with room to exchange them; twice that are 288 for each of 8.

    With 512 it is found, though nothing of it is a buffer; not where a TPU's loop leaves out what is masked.
    """
    config = step_config()
    model = config.model_config(40)
    assert (model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok) == (16, 24, 3)

    def found(text):
        return checks.dense_experts(text, config, model, MeshShape()).found

    program = ragged_product(8, 512, 16, 24)
    dense = program.replace("MODE_GROUP_STARTS", "MODE_UNSPECIFIED")
    both = ["bf16[8,512,16]", "bf16[8,512,24]"]
    assert found(program) == [] and found(dense) == both
    assert found(dense.replace('"is_ragged_dot":true', '"is_ragged_dot":false')) == both
    assert found(program + dense.replace("%masked", "%others").replace("%fused", "%else")) == both
    assert found(dense.replace("512", "280")) == []
    # The gradient of the matrices, which is as small as they are, and batched products of experts with their tiles.
    gradient = "%c = bf16[8,16,24]{2,1,0} convolution(%all, %g), window={size=8 stride=7 lhs_dilate=8}"
    rows = "  %all = bf16[8,512,16]{2,1,0} parameter(0)\n  %g = bf16[8,512,24]{2,1,0} parameter(1)\n"
    body = (
        f"%gradient (all: bf16[8,512,16]) -> bf16[8,16,24] {{\n{rows}  ROOT {gradient}, dim_labels=0fb_0io->0bf\n}}\n"
    )
    assert found(body) == both and found(body.replace("512", "280")) == []


def test_latent_experts_by_hand(step_config):
    """In two layers with eight experts of width 24, matrices of 16 × 24 become 8 × 24, between 16 × 8 and 8 × 16."""
    plain, latent = step_config(), step_config(**{"model.moe_latent_size": 8})
    card = least.Card("card", 2**30, 1e12)
    smaller = 2 * (8 * 2 * (16 - 8) * 24 - 2 * 16 * 8)
    before, after = (least.least_training(config, card, 1) for config in (plain, latent))
    # Weights of both towers, and two moments and a gradient of one.
    assert before.weights - after.weights == 2 * 4 * smaller
    assert before.optimizer - after.optimizer == 2 * 4 * smaller and before.gradients - after.gradients == 4 * smaller
    assert after.flops < before.flops
    served = [least.least_serving(c, card, rows=2, capacity=64).weights for c in (plain, latent)]
    assert served[0] - served[1] == 2 * 2 * smaller


@pytest.mark.whole
def test_latent_experts_compile_for_a_mesh(step_config):
    config = step_config(**{"mesh.expert": 4, "mesh.tensor": 2, "vocab_size": 40, "model.moe_latent_size": 8})
    plan = plan_step(config, Hardware("cpu:8", jax.devices(), 8, 2**30, 1e12))
    assert plan.fits and not any(check.found for check in plan.gates)


def weights(**changes):
    """A stack of three layers of four experts, 16 wide, as parameters are declared; two on each of two devices."""
    values = {"shape": (3, 4, 48, 16), "axes": ("layers", "experts", "embed", "expert_mlp")} | changes
    flags = {"decay": True, "float32": False, "trainable": True, "in_backbone": True}
    return Parameter((), **values, init=None, tensors=None, layout="", **flags, scales=None)


PROGRAM = """
%slice_of_a_layer (param_0: bf16[3,2,48,16], param_1: s32[]) -> bf16[1,2,48,16] {
  %param_0 = bf16[3,2,48,16]{3,2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %less = pred[] compare(%param_1, %param_1), direction=LT
  ROOT %cut = bf16[1,2,48,16]{3,2,1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,2,48,16}
}

%body (tuple: (bf16[3,2,48,16], s32[])) -> bf16[4,48,16] {
  %tuple = (bf16[3,2,48,16]{3,2,1,0}, s32[]) parameter(0)
  %mine = bf16[1,2,48,16]{3,2,1,0} fusion(%tuple), kind=kLoop, calls=%slice_of_a_layer
  %gathered = bf16[1,4,48,16]{3,2,1,0} all-gather(%mine), dimensions={1}
  %product = f32[48,16]{1,0} dot(%gathered, %gathered)
  ROOT %done = bf16[4,48,16]{2,1,0} bitcast(%gathered)
}
"""


def copies(program: str, **changes):
    return checks.weight_copies(program, [weights(**changes)], {"fsdp": 2}, least=1).found


def test_weights_that_are_gathered_and_used_are_not_copied():
    assert copies(PROGRAM) == []


@pytest.mark.parametrize(
    "instruction, found",
    [
        ("bf16[1,4,48,16]{2,3,1,0} copy(%gathered)", "bf16[1,4,48,16] by copy"),
        ("bf16[16,4,48]{2,1,0} transpose(%done), dimensions={2,0,1}", "bf16[16,4,48] by transpose"),
        ("bf16[4,48,16]{2,1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={4,48,16}", "bf16[4,48,16] by dynamic-"),
        ("bf16[4,48,128]{2,1,0} pad(%done, %zero), padding=0_0x0_0x0_112", "bf16[4,48,128] by pad"),
        ("f32[3,2,48,16]{2,3,1,0} copy(%moments)", "f32[3,2,48,16] at rest by copy"),
        ("bf16[2,48,16]{2,1,0} fusion(%tuple), kind=kLoop, calls=%turned", "bf16[2,48,16] at rest by transpose"),
    ],
)
def test_a_weight_that_is_copied_is_found(instruction, found):
    turned = "%turned (a: bf16[2,16,48]) -> bf16[2,48,16] {\n  ROOT %t = bf16[2,48,16]{2,1,0} transpose(%a)\n}\n"
    turned = turned if "turned" in instruction else ""
    (one,) = copies(turned + PROGRAM.replace("  %product", f"  %more = {instruction}\n  %product"))
    assert one.startswith(f"1 × {found}")


def test_a_fusion_that_computes_is_not_a_copy():
    cast = "%cast (a: f32[2,16,48]) -> bf16[2,48,16] {\n  %t = f32[2,48,16]{2,1,0} transpose(%a)\n"
    cast += "  ROOT %c = bf16[2,48,16]{2,1,0} convert(%t)\n}\n"
    more = "bf16[2,48,16]{2,1,0} fusion(%tuple), kind=kLoop, calls=%cast"
    assert copies(cast + PROGRAM.replace("  %product", f"  %more = {more}\n  %product")) == []


def test_a_gradient_that_is_cut_out_of_a_larger_product_is_not_a_copy():
    """As XLA multiplies for queries, keys and values at once; cut out of what comes into the program, it is a copy."""
    merged = "bf16[4,48,40]{2,1,0} fusion(%gathered), kind=kCustom, calls=%several"
    several = "%several (a: bf16[4,48,16]) -> bf16[4,48,40] {\n  ROOT %p = bf16[4,48,40]{2,1,0} dot(%a, %a)\n}\n"
    cut = "%cut = bf16[4,48,16]{2,1,0} slice(%merged), slice={[0:4], [0:48], [0:16]}"

    def program(first):
        return several + PROGRAM.replace("  %product", f"  %merged = {first}\n  {cut}\n  %product")

    assert copies(program(merged)) == []
    assert copies(program("bf16[4,48,40]{2,1,0} get-tuple-element(%tuple), index=0")) == ["1 × bf16[4,48,16] by slice"]
    turned = "%turned = bf16[4,16,48]{2,1,0} transpose(%cut), dimensions={0,2,1}"
    assert copies(program(f"{merged}\n  {turned}")) == ["1 × bf16[4,16,48] by transpose"]


@pytest.mark.parametrize(
    "source, layout, counts",
    [
        ("fusion(), kind=kLoop, calls=%computed", "2,1,0", False),  # zeros to sum upon
        ("fusion(), kind=kLoop, calls=%computed", "1,2,0", True),  # turned
        ("fusion(%gathered), kind=kLoop, calls=%cast", "2,1,0", True),
        ("get-tuple-element(%loop), index=0", "2,1,0", False),  # a sum over the rounds of a loop
        ("get-tuple-element(%loop), index=1", "2,1,0", True),  # a weight that a loop hands through
        ("all-gather(%mine), dimensions={0}", "2,1,0", True),
    ],
)
def test_what_is_computed_may_be_kept_twice(source, layout, counts):
    shape = "bf16[4,48,16]{2,1,0}"
    others = f"""
%computed () -> bf16[4,48,16] {{
  %zero = bf16[] constant(0)
  ROOT %zeros = {shape} broadcast(%zero), dimensions={{}}
}}

%cast (a: f32[4,48,16]) -> bf16[4,48,16] {{
  %a = f32[4,48,16]{{2,1,0}} parameter(0)
  ROOT %c = {shape} convert(%a)
}}

%rounds (tuple: ({shape}, {shape})) -> ({shape}, {shape}) {{
  %carried = ({shape}, {shape}) parameter(0)
  %total = {shape} get-tuple-element(%carried), index=0
  %weights = {shape} get-tuple-element(%carried), index=1
  %more = {shape} add(%total, %weights)
  ROOT %all = ({shape}, {shape}) tuple(%more, %weights)
}}
"""
    loop = f"  %loop = ({shape}, {shape}) while(%tuple), condition=%c, body=%rounds\n"
    more = f"{loop}  %source = {shape} {source}\n  %kept = bf16[4,48,16]{{{layout}}} copy(%source)\n"
    found = copies(others + PROGRAM.replace("  %product", f"{more}  %product"))
    assert found == (["1 × bf16[4,48,16] by copy"] if counts else [])


@pytest.mark.parametrize(
    "copied, order, retiled",
    [
        ("copy(%weights)", "3,2,1,0", True),
        ("copy(%done)", "3,2,1,0", True),
        ("copy(%together)", "3,2,1,0", True),
        ("copy(%gathering_done)", "3,2,1,0", True),
        ("copy(%summing_done)", "3,2,1,0", False),  # a call that does something else
        ("copy(%weights)", "2,3,1,0", False),  # turned
        ("copy(%looped)", "3,2,1,0", False),  # no argument
    ],
)
def test_arguments_put_into_other_tiles_are_measured(copied, order, retiled):
    """Once a call, from tiles of 8 rows to tiles of 16, whether or not XLA fetches them first."""
    shape = "bf16[3,2,48,16]{3,2,1,0:T(8,128)(2,1)}"
    copy = f"  %copy = bf16[3,2,48,16]{{{order}:T(16,128)(2,1)}} {copied}\n"
    entry = f"""
%gathers (mine: bf16[3,1,48,16]) -> bf16[3,2,48,16] {{
  %mine = bf16[3,1,48,16]{{3,2,1,0}} parameter(0)
  ROOT %gathered = {shape} all-gather(%mine), dimensions={{1}}
}}

%sums (mine: bf16[3,2,48,16]) -> bf16[3,2,48,16] {{
  %mine = {shape} parameter(0)
  ROOT %sum = {shape} all-reduce(%mine)
}}

ENTRY %main (weights: bf16[3,2,48,16]) -> bf16[4,48,16] {{
  %weights = {shape} parameter(0)
  %start = ({shape}, {shape}, u32[]) copy-start(%weights)
  %done = {shape} copy-done(%start)
  %part = s8[400]{{0}} slice-start(%weights)
  %part_done = s8[400]{{0}} slice-done(%part)
  %together = {shape} custom-call(%part_done, %part_done), custom_call_target="ConcatBitcast"
  %gathering = ((), (), (s32[8]{{0}})) custom-call-start(), called_computations={{%gathers}}
  %gathering_more = (({shape}), {shape}) custom-call-update(%gathering, %weights)
  %gathering_done = {shape} custom-call-done(%gathering_more)
  %summing = ((), (), (s32[8]{{0}})) custom-call-start(), called_computations={{%sums}}
  %summing_more = (({shape}), {shape}) custom-call-update(%summing, %weights)
  %summing_done = {shape} custom-call-done(%summing_more)
  %tuple = ({shape}) tuple(%weights)
  %while = ({shape}) while(%tuple), condition=%c, body=%body
  %looped = {shape} get-tuple-element(%while), index=0
{copy}}}
"""
    arguments = [weights()], {"fsdp": 2}, 1
    assert checks.retiled_bytes(PROGRAM + entry, *arguments) == (3 * 2 * 48 * 16 * 2 if retiled else 0)
    assert copies(PROGRAM + entry) == ([] if retiled else ["1 × bf16[3,2,48,16] at rest by copy"])
    in_a_loop = PROGRAM.replace("  %product", f"{copy}  %product").replace("%tuple = ", "%weights = ")
    assert copies(in_a_loop) and not checks.retiled_bytes(in_a_loop, *arguments)


def test_an_argument_that_another_core_puts_into_other_tiles_is_measured():
    """By a call in parts; not in a loop."""
    shape, other = "bf16[3,2,48,16]{3,2,1,0:T(8,128)(2,1)}", "bf16[3,2,48,16]{3,2,1,0:T(16,128)(2,1)}"
    there = f"""
%inner (given: bf16[3,2,48,16]) -> bf16[3,2,48,16] {{
  %given = {shape} parameter(0)
  ROOT %copy = {other} copy(%given)
}}, execution_thread="sparsecore"

%outer (given: bf16[3,2,48,16]) -> bf16[3,2,48,16] {{
  %handed = {shape} parameter(0)
  %one = ({shape}) tuple(%handed)
  %element = {shape} get-tuple-element(%one), index=0
  %begun = (({shape}), {other}, u32[]) call-start(%element), to_apply=%inner
  ROOT %done = {other} call-done(%begun)
}}, execution_thread="sparsecore"

"""
    call = f"""  %started = ((), (), (s32[8]{{0}})) custom-call-start(), called_computations={{%outer}}
  %updated = (({shape}), {other}) custom-call-update(%started, %argument)
"""
    entry = f"ENTRY %main (argument: bf16[3,2,48,16]) -> s32[] {{\n  %argument = {shape} parameter(0)\n{call}}}\n"
    arguments = [weights()], {"fsdp": 2}, 1
    assert checks.retiled_bytes(there + PROGRAM + entry, *arguments) == 3 * 2 * 48 * 16 * 2
    assert copies(there + PROGRAM + entry) == []
    looped = f"  %argument = {shape} get-tuple-element(%tuple), index=0\n{call}"
    program = there + PROGRAM.replace("  %product", f"{looped}  %product") + "ENTRY %main () -> s32[] {\n}\n"
    assert copies(program) == ["1 × bf16[3,2,48,16] at rest by copy"]


def test_every_output_of_a_fusion_is_looked_at():
    both = "%both (a: bf16[4,16,48]) -> (bf16[4,48,16], s32[3]) {\n  %t = bf16[4,48,16]{2,1,0} transpose(%a)\n"
    both += "  %n = s32[3]{0} iota()\n  ROOT %r = (bf16[4,48,16]{2,1,0}, s32[3]{0}) tuple(%t, %n)\n}\n"
    more = "%more = (bf16[4,48,16]{2,1,0:T(8,128)(2,1)}, s32[3]{0}) fusion(%tuple), kind=kLoop, calls=%both"
    (one,) = copies(both + PROGRAM.replace("  %product", f"  {more}\n  %product"))
    assert one == "1 × bf16[4,48,16] by transpose"


def test_the_compiler_s_own_words_for_a_copy_are_known():
    """A weight that has to be turned is found: the check reads what XLA writes."""
    matrix = weights(shape=(64, 96), axes=("embed", "mlp"))
    turned = jax.jit(lambda w: jax.lax.optimization_barrier(w.T) + 0).lower(jnp.zeros((64, 96))).compile().as_text()
    used = jax.jit(lambda w: w @ w.T).lower(jnp.zeros((64, 96))).compile().as_text()
    assert checks.weight_copies(turned, [matrix], {}, least=1).found
    assert not checks.weight_copies(used, [matrix], {}, least=1).found


# The least of an adapter's step.


def test_the_bytes_of_an_adapters_step(step_config):
    config = step_config(**{"lora.rank": 2, "lora.base": "bfloat16", "dtype": "bfloat16", "mesh.fsdp": -1})
    objective = make_objective(config, config.model_config(config.vocab_size))
    numbers, declared = count(objective.adapter), parameter_table(objective.model)
    half = sum(math.prod(p.shape) * (4 if p.float32 else 2) for p in declared.values())
    one = least.least_training(config, least.ADAPTING[0], 1)
    assert (one.frozen, one.gradients, one.optimizer - 8 * numbers) == (half, 4 * numbers, 8)  # two counts of steps
    text = least.adapter_markdown(config).splitlines()
    assert text[0] == "| one step of an adapter, its base in | bfloat16 | int8 | int4 |"
    assert text[2].startswith(f"| base, GiB | {half / 2**30:.2f} |") and len(text) == 10


# The table of docs/guide/scale.md.


def test_rows_are_kept_as_they_come(tmp_path, plan_of_a_layer):
    path = tmp_path / "scale.json"
    assert table.load(path) == {} and table.markdown({}, table.PRICES) == ""
    plan = plan_of_a_layer
    figures = report.as_json(plan)
    for topology in ("v6e:16x16", "v5p:8x8x4"):
        table.store(path, topology, figures | {"hardware": topology})
    assert list(table.load(path)) == ["v5p:8x8x4", "v6e:16x16"]
    head, line, *rows = table.markdown(table.load(path), table.parse_prices(["v6e=100"])).splitlines()
    assert head == "| one train step | v5p:8x8x4 | v6e:16x16 |" and line == "| --- | --: | --: |"
    days = 2.1e12 / plan.tokens_per_second / 86400
    dollars = [f"${days * 24 * 8 * price / 1e6:.2f} M at ${price:.2f}" for price in (table.PRICES["v5p"], 100.0)]
    assert f"| dollars, at an assumed price a chip-hour | {dollars[0]} | {dollars[1]} |" in rows
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a file of this table's rows"):
        table.load(path)


@pytest.mark.parametrize("price", ["v5p", "v5p=free", "v5p=0", "gpu=3"])
def test_prices_that_mean_nothing(price):
    with pytest.raises(ValueError, match="GENERATION=DOLLARS"):
        table.parse_prices([price])


@pytest.mark.parametrize(("config", "page"), [("nano30b", "guide/scale.md"), ("nano4b", "reports/nano4b.md")])
def test_the_docs_show_the_rows_as_they_were_made(tmp_path, config, page):
    docs = ROOT / "docs"
    before = (docs / page).read_text(encoding="utf-8")
    text = table.markdown(table.load(docs / "reports" / "scale.json"), table.PRICES, config)
    assert text in before
    # Put into the page again, it is the same page; without its lines, the page is refused and stays.
    copy = tmp_path / "page.md"
    copy.write_text(before.replace(text, "| an older table |"), encoding="utf-8")
    table.replace(copy, config, text)
    assert copy.read_text(encoding="utf-8") == before
    copy.write_text(text)
    with pytest.raises(ValueError, match=f"page.md: no lines '<!-- {config}: rows -->' and '<!-- {config}: end -->'"):
        table.replace(copy, config, text)
    assert copy.read_text() == text


def test_rows_of_models():
    assert len({row.name for row in table.ROWS}) == len(table.ROWS)
    names = [row.name for row in table.rows_of("nano4b")]
    assert {"nano4b v5p:4x4x4", "nano4b v5e:1x1 serve", "nano4b v5e:1x1 serve int8"} <= set(names)
    with pytest.raises(ValueError, match=r"no rows for a config named 'tiny' \(there are for nano30b, nano4b\)"):
        table.rows_of("tiny")


def test_a_step_that_the_compiler_refuses(plan_of_a_layer, tmp_path):
    """Its words say how much it would take; another failure is no answer."""

    class Lowered:
        message = "Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    refused = Lowered()
    assert compile_or_refuse(refused) == (None, int(17.5 * 2**30), "Used 17.50G of 15.75G hbm")
    found = plan_of_a_layer._replace(
        memory=2**30, activations=2**30, gates=[], predicted=None, refused="Used 1.5G of 1G hbm"
    )
    assert "the compiler makes no program: Used 1.5G of 1G hbm" in report.describe(found)
    table.store(tmp_path / "t.json", "nano4b v5e:2x4", report.as_json(found))
    text = table.markdown(table.load(tmp_path / "t.json"), table.PRICES, "nano4b")
    assert "| fits with 10% free | no: Used 1.5G of 1G hbm |" in text and "| limited by | – |" in text
    refused.message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_or_refuse(refused)


def test_what_kernels_compute_of_a_step(step_config):
    """Scans, convolutions, attention over what is seen, routed experts; each trained tower three times."""
    config = step_config()
    model = config.model_config(40)
    scan = 2 * model.conv_kernel * model.conv_channels + 4 * model.mamba_inner * model.ssm_state_size
    heads = 4 * model.num_attention_heads * model.head_dim
    routed = 4 * model.hidden_size * model.num_experts_per_tok * model.moe_intermediate_size
    length = config.sequence_length
    keys = (length + 1) / 2 + 3 * (length + 4) / 2
    a_token = (1 + 3) * (2 * scan + 2 * routed) + heads * keys
    assert step_flops(config, model, 4, in_kernels=True) == pytest.approx(config.batch_size * length * a_token)


@pytest.mark.whole
def test_serving_on_one_device(step_config):
    """Weights in bfloat16, and caches of two Mamba layers and one with keys."""
    model = step_config().model_config(40)
    hardware = Hardware("cpu", jax.devices(), 8, 2**30, 1e12)
    plan = serving.plan_serving(model, hardware, batch=2, capacity=64, block_size=4)
    parameters = parameter_table(TwoTower(model)).values()
    assert plan.weights == sum(math.prod(p.shape) * (4 if p.float32 else 2) for p in parameters)
    keys, convolution, state = 2 * 2 * 64 * 2 * 4 * 2, 2 * 4 * (32 + 2 * 4 * 8) * 2, 2 * 8 * 4 * 8 * 4
    assert plan.cache == keys + 2 * (convolution + state) + 2 * 4
    assert len(plan.functions) == 3 and plan.fits
    assert not plan._replace(memory=plan.total).fits
    assert "fits" in serving.describe(plan) and serving.as_json(plan)["gates"] == {checks.WEIGHT_COPIES: []}


@pytest.mark.parametrize("name", ["v9:1", "v5p", "v5p:", "v5p:2x-1", "v5p:axb", "h200"])
def test_a_topology_that_means_nothing(name):
    with pytest.raises(ValueError, match="give a generation and a shape"):
        hardware.find(name)


def test_the_command_refuses_in_one_line():
    done = run_command("compile", f"--config={ROOT / 'configs/tiny.py'}", "--topology=v9:1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: topology 'v9:1'") and done.stderr.count("\n") == 1
