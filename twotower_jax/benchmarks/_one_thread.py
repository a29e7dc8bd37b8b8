"""XLA on one thread, for times in processor seconds: threads that wait for one another would count as work."""

import os


def use_one_thread() -> None:
    """To be called before JAX computes anything."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
