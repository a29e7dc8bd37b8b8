"""Times the ops: every implementation that runs here, against simpler forms, and against what the machine can do.

    python launch/benchmark.py kernels                                    # the shapes of configs/tiny.py
    python launch/benchmark.py kernels --shape=nano --dtype=bfloat16      # layers of the 30B model, for an accelerator

Everything compared runs in one process, in turns, and the median of the turns counts. On a CPU these are processor
seconds on one thread, which a busy machine changes less than the time of day; on an accelerator the time of some calls
one after the other, so that the gaps between them do not count. `of matrix rate` is the time that the case's own
operations would take at the rate of a large matrix product of the same dtype in this run; `of bandwidth` the time that
reading what must be read and writing what must be written once would take at the rate of copying a large array. A form
may do more than either counts. Temporaries are what the compiled form needs beside arguments and results.

On a GPU `ssd` is compared with the Triton kernels of `mamba_ssm`, if that and PyTorch are installed (_mamba_ssm.py), in
the same turns. What the kernels are to reach on an H200 (_kernel_goals.py) stands below the table.
"""

import jax
import jax.numpy as jnp
from absl import flags

from twotower_jax.benchmarks._kernel_forms import MAKERS, SHAPES, forms
from twotower_jax.benchmarks._kernel_goals import Measured, goals
from twotower_jax.benchmarks._mamba_ssm import INSTALL, MambaSSM
from twotower_jax.benchmarks._one_thread import use_one_thread
from twotower_jax.benchmarks._timing import Timed, ceilings


def define_flags() -> None:
    flags.DEFINE_enum("shape", "tiny", list(SHAPES), "Of the layers.")
    flags.DEFINE_integer("chunk_size", None, "Q, instead of the shape's.", lower_bound=1)
    flags.DEFINE_integer("turns", 15, "How often each form runs.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of activations and weights.")
    flags.DEFINE_list("op", list(MAKERS), "Which ops.")
    flags.DEFINE_list(
        "skip",
        None,
        "Implementations to leave out; default: with --shape=nano reference and dense, which take too much.",
    )


def main() -> None:
    use_one_thread()
    values = flags.FLAGS
    shape, dtype = SHAPES[values.shape](), jnp.dtype(values.dtype)
    if values.chunk_size:
        shape = shape._replace(chunk=values.chunk_size)
    if unknown := sorted(set(values.op) - set(MAKERS)):
        raise ValueError(f"--op: there is no op {unknown[0]!r}; there are {', '.join(MAKERS)}")
    skip = values.skip if values.skip is not None else (["reference", "dense"] if values.shape == "nano" else [])
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {values.dtype}, {shape}, median of {values.turns} turns\n", flush=True)
    library = _mamba_ssm() if "ssd" in values.op and "mamba_ssm" not in skip else None
    product, copy = (Timed(form) for form in ceilings(dtype))
    cases: dict[str, list[Timed]] = {}
    for form in forms(shape, dtype, values.op, skip, library):
        try:
            cases.setdefault(form.case, []).append(Timed(form))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{form.case}, {form.name}: left out, its memory exceeds the device's", flush=True)
    everything = [product, copy, *(timed for case in cases.values() for timed in case)]
    for _ in range(values.turns):
        for timed in everything:
            timed.run()
    rate, bandwidth = product.form.operations / product.median, copy.form.must_move / copy.median
    print(f"large matrix product {rate / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:,.1f} GB/s\n")
    print("| case | form | median | against xla | of matrix rate | of bandwidth | temporaries |")
    print("|---|---|--:|--:|--:|--:|--:|")
    measured = []
    for case in cases.values():
        xla = [timed.median for timed in case if timed.form.name == "xla"]
        for timed in case:
            form, seconds = timed.form, timed.median
            of_bandwidth = form.must_move / bandwidth / seconds
            measured.append(Measured(form.case, form.name, seconds, timed.temporaries, of_bandwidth))
            against = f"{seconds / xla[0]:.2f}" if xla else ""
            print(
                f"| {form.case} | {form.name} | {seconds * 1e3:.3f} ms | {against} | "
                f"{form.operations / rate / seconds:.1%} | {of_bandwidth:.1%} | {timed.temporaries / 2**20:,.1f} MiB |"
            )
    if rows := list(goals(measured)):
        print("\n| case | our fastest form | reaches | wanted on an H200, of the 30B model |")
        print("|---|---|---|---|")
        print("\n".join(rows))


def _mamba_ssm() -> MambaSSM | None:
    """The library, or None with a line that says why it is left out."""
    if jax.default_backend() != "gpu":
        print(f"mamba_ssm is left out: it runs on NVIDIA GPUs, not on {jax.default_backend()}\n")
        return None
    try:
        return MambaSSM()
    except (ImportError, AttributeError) as error:
        print(f"mamba_ssm is left out: {error}; install it with: {INSTALL}\n")
        return None
