"""JAX settings that a user's environment may make, and that would change the numbers or stop a run: refused."""

import jax

# The value each has where nobody set it; what is computed, and the tests, are of these.
EXPECTED = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_accurate_erf_inv": False,
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "jax_use_hlo_logistic_lowering": None,
    "jax_ragged_dot_use_ragged_dot_instruction": True,
    "jax_pallas_poison_buffers": False,
    "jax_default_device": None,
    "jax_use_direct_linearize": True,
    "jax_legacy_prng_key": "allow",
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_check_tracer_leaks": False,
    "jax_transfer_guard": None,
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
}


def check_settings() -> None:
    """Refuses JAX settings under which a command would compute other numbers than it is tested to, or not end.

    The random generator is not among them: the program names its own (`randomness.key`).

    Raises:
      ValueError: naming the first variable and its value.
    """
    for name, expected in EXPECTED.items():
        # A setting that this version of JAX does not have cannot be set.
        found = jax.config.values.get(name, expected)
        found = getattr(found, "value", found)  # of the enumerations, as one writes them
        if found != expected:
            raise ValueError(
                f"{name.upper()}={found} changes what this program computes, which is tested without it; unset it"
            )
