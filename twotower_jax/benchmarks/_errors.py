"""How far an implementation of an op is from float64, by norm: what kernel_errors.py and accelerator/ tell."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax.benchmarks._error_cases import Case


def errors(case: Case, name: str, dtype: str, seed: int) -> tuple[float, float]:
    """Errors of one problem's outputs and of its gradients (0 where there are none)."""
    arrays = problem(case, dtype, seed)
    return compared(case, name, arrays, oracle(case, name in case.gradients, arrays))


def problem(case: Case, dtype: str, seed: int) -> list:
    """The arguments of one problem, which case and seed decide."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{case.op}, {case.kind}".encode())])
    return case.arrays(rng, jnp.dtype(dtype))


def oracle(case: Case, differentiable: bool, arrays: list) -> tuple[list, list]:
    """Outputs and, if `differentiable`, gradients in float64: on the host where the platform is one without it."""
    device = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None
    with jax.enable_x64(True), jax.default_device(device):
        return jax.tree.map(np.asarray, _run(case, case.exact, differentiable, jax.tree.map(_widened, arrays)))


def compared(case: Case, name: str, arrays: list, exact: tuple[list, list]) -> tuple[float, float]:
    """Errors of what an implementation makes of a problem; `exact` has gradients if the implementation has."""
    found = _run(case, name, name in case.gradients, arrays)
    return _worst(found[0], exact[0], 0), _worst(found[1], exact[1], 0.01)


def _widened(v: jax.Array) -> np.ndarray:
    whole = jnp.issubdtype(v.dtype, jnp.integer)
    # The scales of quantized matrices stay as they are: they are no argument of their own.
    return np.asarray(v) if whole else np.asarray(v, np.float64)


def _run(case: Case, name: str, differentiable: bool, arrays: list) -> tuple[list, list]:
    """The outputs, and the gradients of a weighted sum of them in all floating-point arguments."""
    floating = [i for i, v in enumerate(arrays) if jnp.issubdtype(jax.tree.leaves(v)[0].dtype, jnp.floating)]

    def loss(*arrays):
        outputs = case.run(name, *arrays)
        rng = np.random.default_rng(0)
        total = 0
        for v in outputs:
            # Numbers of 8 bits, which are the same in every dtype.
            weights = jnp.asarray(rng.standard_normal(v.shape), jnp.bfloat16).astype(v.dtype)
            total += jnp.sum(v * weights, dtype=jnp.promote_types(v.dtype, jnp.float32))
        return total, outputs

    if not differentiable:
        return jax.jit(lambda *arrays: case.run(name, *arrays))(*arrays), []
    gradients, outputs = jax.jit(jax.grad(loss, argnums=floating, has_aux=True))(*arrays)
    return outputs, gradients


def _worst(found, exact, least: float) -> float:
    """The largest error, each array's norm counting as at least so much of the largest one."""
    norms = [np.linalg.norm(b) for b in exact]
    floor = max([1e-30, *(least * norm for norm in norms)])
    differences = (np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b)) for a, b in zip(found, exact, strict=True))
    return max((d / max(norm, floor) for d, norm in zip(differences, norms, strict=True)), default=0.0)
