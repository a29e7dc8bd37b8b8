"""XLA on one thread, for times in processor seconds: threads that wait for one another would count as work."""

import os


def use_one_thread() -> None:
    """To be called before JAX computes anything."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


def use_one_core() -> None:
    """The same, and on one core, where the system can say so: with several, XLA's threads hand small operations to one
    another all the same, which takes a third of the processor time of a small model's steps. Compiling takes longer.
    """
    use_one_thread()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
