"""The flags of how to generate, which commands that generate share."""

from absl import flags

from twotower_jax import strategy_flags
from twotower_jax.choices import MODES, SCHEDULES

flags.adopt_module_key_flags(strategy_flags)
MODE = flags.DEFINE_string("mode", "diffusion", f"One of {', '.join(MODES)}.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each row, a multiple of the block or not.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens denoised together; at most what was trained.")
STEPS = flags.DEFINE_integer("steps_per_block", None, "Most denoiser evaluations per block; default: the block size.")
THRESHOLD = flags.DEFINE_float("confidence_threshold", None, "Commit tokens surer than this (strategies that have it).")
SCHEDULE = flags.DEFINE_string("schedule", None, f"Of the other strategies: one of {', '.join(SCHEDULES)}.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the most probable tokens that hold this much; 1: all.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-text token.")
TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.0, "Mode speculative: keep a draft at least 1 - this as probable as AR's best; 0: AR's tokens only."
)
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 512, "Prompts are read in pieces of at most this many tokens.")
MAX_CACHE_GB = flags.DEFINE_float(
    "max_cache_gb", None, "Refuse to start if a device's caches need more; default: what it has free."
)
