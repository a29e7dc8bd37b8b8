"""The Triton kernels of `mamba_ssm`, as a form of `ssd` to compare with: they share the process and the arrays.

`mamba_chunk_scan_combined` (state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py) takes x (B, L, H, P), dt (B, L,
H), A (H,), B and C (B, L, G, N) and initial states (B, H, P, N), in that order of axes, as `kernels.ssd` does. It forms
the log-decays dt·A itself, for one A a head; a skip D, a gate z, a bias and a softplus of dt are left out, since `ssd`
has none of them. Its y has the dtype of x, ours is float32. What the host takes to start its kernels counts where
it is longer than they are.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

INSTALL = "pip install torch && pip install --no-build-isolation mamba-ssm"


class MambaSSM:
    """`mamba_ssm` with the PyTorch that it runs in."""

    def __init__(self):
        """Raises ImportError if either is not installed, or has no scan of that name."""
        self.torch = importlib.import_module("torch")
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        self.scan: Callable = module.mamba_chunk_scan_combined

    def tensors(self, *arrays: jax.Array) -> tuple[Any, ...]:
        """Copies on the arrays' device, in their dtypes, that may have gradients."""
        jax.block_until_ready(arrays)
        return tuple(self.torch.from_dlpack(v).clone().requires_grad_() for v in arrays)

    def forward(self, chunk_size: int) -> Callable:
        """(x, dt, A, B, C, initial states) → y and the last state, without what a gradient would need."""

        def run(*tensors):
            with self.torch.no_grad():
                return self._scan(chunk_size, *tensors)

        return run

    def gradient(self, chunk_size: int) -> Callable:
        """The gradients of the sum of all squares in the same arguments, forward and backward."""

        def run(*tensors):
            y, last = self._scan(chunk_size, *tensors)
            return self.torch.autograd.grad(y.float().square().sum() + last.float().square().sum(), tensors)

        return run

    def _scan(self, chunk_size, x, dt, a, b, c, initial):
        return self.scan(x, dt, a, b, c, chunk_size, initial_states=initial, return_final_states=True)

    def wait(self, result) -> None:
        """Until everything that was started is done."""
        del result
        self.torch.cuda.synchronize()

    def temporaries(self, function: Callable, arguments: tuple) -> int:
        """The most bytes that a call takes beside arguments and results."""
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        result = function(*arguments)
        cuda.synchronize()
        most = cuda.max_memory_allocated() - cuda.memory_allocated()
        del result
        return most
