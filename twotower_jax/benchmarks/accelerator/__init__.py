"""Everything that is worth measuring on an accelerator that is at hand for half an hour, in order of value.

    python launch/benchmark.py accelerator --minutes=8

A second call goes on where the first stopped. What is measured, each in small units:

    errors    every kernel against float64 on the device, forward and gradients, at the model's shapes
    speed     every kernel, XLA's form and what libraries have, against a matrix product and a copy of the same turns
    passes    a denoiser evaluation and an AR step at full width against the bytes that they must move
    train     the train step at full width, with model FLOP utilization
    generate  three modes through the engine

Needs jax, flax and numpy (with what these need), and neither an installation of this package nor any other: a clone is
enough (bare.py). The parent (command.py) knows nothing of JAX: a child (worker.py) does the work, and is replaced where
it hangs or dies.
"""
