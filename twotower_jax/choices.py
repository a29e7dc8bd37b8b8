"""The names that flags let one choose between, where a command finds them before it imports what takes seconds.

The first four are said here alone. The others are names of what is registered or listed elsewhere, which
tests/launch/test_help.py holds against them.
"""

MODES = ("diffusion", "ar", "mock_ar", "speculative")
# How a single tower's denoiser begins, see `checkpoint.plan`; what an export holds; what an adapter changes.
TIME_INITS = ("identity", "reference")
TOWERS = ("both", "context", "denoiser")
APPLIED_TO = ("context", "denoiser", "both")

STRATEGIES = ("confidence", "posterior", "predict_and_noise", "entropy_bounded", "remasking", "factor")
SCHEDULES = ("linear", "cosine", "exponential")
QUANTIZATIONS = ("int8", "int4")
REWARDS = ("exact", "words")
