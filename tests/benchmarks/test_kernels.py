"""The measurements of kernels: what they compare with, what they call an error, and which goals they print."""

import contextlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.benchmarks import kernel_errors
from twotower_jax.benchmarks._error_cases import Case, cases
from twotower_jax.benchmarks._kernel_forms import Shape, forms
from twotower_jax.benchmarks._kernel_goals import ONE_MATRIX, Measured, goals
from twotower_jax.benchmarks._kernel_resources import Resources, parsed
from twotower_jax.benchmarks._mamba_ssm import MambaSSM
from twotower_jax.kernels.ssd.reference import ssd_sequential

SMALL = Shape(1, 40, 8, 16, 16, 4, 8, 2, 16, 32, 4, 2, 16, 2, 1, 16)


class Tensor:
    """As much of a PyTorch tensor as the adapter uses: a value, and how it follows from those that have gradients."""

    def __init__(self, value, of=None):
        self.value, self.of, self.wanted = value, of or (lambda values: values[id(self)]), False

    def __getattr__(self, name):
        return getattr(self.value, name)  # shape, dtype

    def clone(self):
        return Tensor(jnp.copy(self.value))

    def requires_grad_(self):
        self.wanted = True
        return self

    def then(self, function):
        return Tensor(function(self.value), lambda values: function(self.of(values)))

    def float(self):
        return self.then(lambda v: v.astype(jnp.float32))

    def square(self):
        return self.then(jnp.square)

    def sum(self):
        return self.then(jnp.sum)

    def __add__(self, other):
        return Tensor(self.value + other.value, lambda values: self.of(values) + other.of(values))


@pytest.fixture
def library(monkeypatch):
    """`mamba_ssm` and `torch` as the adapter finds them: the documented arguments, and the recurrence for kernels."""
    calls, without_gradients = [], []

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
    ):  # fmt: skip
        batch, length, heads, head_dim = x.shape
        groups, state = B.shape[2:]
        assert dt.shape == (batch, length, heads) and A.shape == (heads,) and heads % groups == 0
        assert B.shape == C.shape == (batch, length, groups, state)
        assert initial_states.shape == (batch, heads, head_dim, state) and return_final_states
        assert D is z is dt_bias is seq_idx is cu_seqlens is None and not dt_softplus and not return_varlen_states
        calls.append((chunk_size, bool(without_gradients)))
        inputs = [x, dt, A, B, C, initial_states]

        @jax.jit
        def scan(x, dt, a, b, c, initial):
            arrays = (v.astype(jnp.float32) for v in (x, dt, dt * a, b, c, initial))
            y, last = ssd_sequential(*arrays)
            return y.astype(x.dtype), last

        found = scan(*(v.value for v in inputs))
        return tuple(
            Tensor(v, lambda values, i=i: scan(*(w.of(values) for w in inputs))[i]) for i, v in enumerate(found)
        )

    def grad(loss, tensors):
        assert all(v.wanted for v in tensors) and not without_gradients
        names, values = [id(v) for v in tensors], [v.value for v in tensors]
        return jax.jit(jax.grad(lambda values: loss.of(dict(zip(names, values, strict=True)))))(values)

    @contextlib.contextmanager
    def no_grad():
        without_gradients.append(True)
        yield
        without_gradients.pop()

    module = types.SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    torch = types.SimpleNamespace(from_dlpack=Tensor, no_grad=no_grad, autograd=types.SimpleNamespace(grad=grad))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
    for package in "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton":
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    return MambaSSM(), calls


@pytest.mark.whole
def test_mamba_ssm_is_asked_for_what_ours_computes(library):
    """Through the forms that are timed: the same arguments, outputs and gradients."""
    library, calls = library
    found = list(forms(SMALL, jnp.dtype("float32"), ["ssd"], ["reference"], library))
    assert [form.name for form in found] == ["xla"] * 2 + ["mamba_ssm, chunks of 16"] * 2 + [
        "mamba_ssm, chunks of 256"
    ] * 2
    ours = [jax.jit(form.function)(*form.arguments) for form in found[:2]]
    theirs = [form.function(*form.arguments) for form in found[2:]]
    assert calls == [(16, True), (16, False), (256, True), (256, False)]
    for y, last in theirs[::2]:
        np.testing.assert_allclose(y.value, ours[0][0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(last.value, ours[0][1], rtol=1e-4, atol=1e-4)
    dx, ddt, ddecay, db, dc, dinitial = ours[1]
    for gradients in theirs[1::2]:
        # Its log-decays are dt·A with A = −1, ours an argument of their own.
        expected = dx, ddt - ddecay, jnp.sum(ddecay * found[0].arguments[1], axis=(0, 1)), db, dc, dinitial
        for one, other in zip(gradients, expected, strict=True):
            assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)
    assert {form.must_move for form in found[::2]} == {found[0].must_move}
    assert [form.operations for form in found[2:4]] == [form.operations for form in found[:2]]


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        MambaSSM()


def test_goals_compare_our_fastest_form():
    many, few = "expert_mlp, 49152 rows", "expert_mlp, 96 rows of 69 experts, int8"
    measured = [
        Measured("ssd", "xla", 3.0, 0, 0.1),
        Measured("ssd", "mosaic_gpu", 1.0, 0, 0.1),
        Measured("ssd", "mamba_ssm, chunks of 128", 2.5, 0, 0.1),
        Measured("ssd", "mamba_ssm, chunks of 256", 2.0, 0, 0.1),
        Measured("two_tower_ssd, gradient", "mosaic_gpu", 1.0, 0, 0.1),
        Measured("two_tower_ssd, gradient", "stored_states", 3.0, 0, 0.1),
        Measured(many, "mosaic_gpu_grouped", 1.0, 2**29, 0.1),
        Measured(many, ONE_MATRIX, 0.5, 0, 0.1),
        Measured(few, "mosaic_gpu", 1.0, 0, 0.65),
        Measured("attention, causal", "xla", 1.0, 0, 0.65),
    ]
    assert list(goals(measured)) == [
        "| ssd | mosaic_gpu | 2.00 × as fast as the Triton kernels of mamba_ssm | at least 1.5 × |",
        "| two_tower_ssd, gradient | mosaic_gpu | 3.00 × as fast as with a state stored for each block "
        "| at least 2 × |",
        f"| {many} | mosaic_gpu_grouped | as fast as jax.lax.ragged_dot: ragged_dot did not run here | at least 20 × |",
        f"| {many} | mosaic_gpu_grouped | 0.50 × of the speed of a dense product of as many operations "
        "| at least 0.6 × |",
        f"| {many} | mosaic_gpu_grouped | 0.50 GiB of temporaries | at most 0.5 GiB |",
        f"| {few} | mosaic_gpu | 0.65 × of the bandwidth of copying, on the weights touched | at least 0.7 × |",
    ]


def test_every_op_has_goals_under_the_names_that_are_timed():
    """The goals find their cases and baselines by name."""
    names = {(form.case, form.name) for form in forms(SMALL, jnp.dtype("float32"), ["two_tower_ssd", "expert_mlp"], [])}
    rows = list(goals([Measured(case, name, 1.0, 0, 0.1) for case, name in sorted(names)]))
    assert len(rows) == 3 + 2 * 3 + 3 and not any("did not run" in row for row in rows)


@pytest.mark.parametrize("op", ["ssd", "two_tower_ssd", "block_scan", "causal_conv", "block_causal_conv", "attention"])
def test_errors_are_small_where_nothing_is_wrong(op):
    case = next(case for case in cases() if case.op == op)
    outputs, gradients = kernel_errors.errors(case, "xla", "float32", 0)
    assert 0 < outputs < 1e-6 and 0 < gradients < 5e-6


@pytest.mark.whole
def test_errors_of_experts():
    of_experts = [case for case in cases() if case.op == "expert_mlp"]
    for case in of_experts[2], of_experts[-1]:
        outputs, gradients = kernel_errors.errors(case, "xla", "float32", 0)
        assert 0 < outputs < 1e-6 and gradients < 1e-6 and (gradients > 0) == ("xla" in case.gradients)


def test_errors_are_those_of_the_worst_array():
    """In outputs and gradients, by norm; a gradient that vanishes counts as a hundredth of the largest."""

    def run(name, x, small):
        off = 0.0 if name == "exact" else 1e-3
        return x * (1 + off), 0.0 * x + small * 1e-6 * (1 + off)

    case = Case("", "", lambda rng, dtype: [jnp.ones(4), jnp.ones(4)], run, "exact", {}, ("off",))
    outputs, gradients = kernel_errors.errors(case, "off", "float32", 0)
    np.testing.assert_allclose(outputs, 1e-3, rtol=1e-3)
    np.testing.assert_allclose(gradients, 1e-3, rtol=1e-3)
    assert kernel_errors.errors(case._replace(gradients=()), "off", "float32", 0)[1] == 0


def test_what_compilers_say_of_a_kernel_s_resources():
    """As jax 0.12.0.1 and ptxas 12.9 print them."""
    said = """Resources(smem_scratch_bytes=58368, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(): 1}))
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)
ptxas warning : Registers are spilled to local memory in function 'states_mosaic_gpu_kernel', 16 bytes spill stores
ptxas info    : Compiling entry function 'states_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for states_mosaic_gpu_kernel
    16 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compiling entry function 'outputs_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
    assert parsed(said) == [Resources("states", 255, 48, 58368), Resources("outputs", 168, 0, 1024)]
    assert [kernel.shared for kernel in parsed(said.partition("\n")[2])] == [None, None]
    assert parsed("") == []
