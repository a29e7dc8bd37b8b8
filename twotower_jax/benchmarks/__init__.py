"""The measurements of every number in the docs, one file each; `launch/benchmark.py NAME` runs one.

Each module has `define_flags()` and `main()`.
"""
