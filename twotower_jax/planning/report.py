"""A `StepPlan` for people and for programs."""

from typing import Any

from twotower_jax.planning import checks
from twotower_jax.planning.hardware import GIB
from twotower_jax.planning.plan import HEADROOM, UTILIZATION, StepPlan
from twotower_jax.planning.predict import as_figures

# Tokens that the published denoiser was trained on.
PUBLISHED_TOKENS = 2.1e12


def describe(plan: StepPlan) -> str:
    """Some lines."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    free = plan.memory - plan.total
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    days = PUBLISHED_TOKENS / plan.tokens_per_second / 86400
    lines = [
        f"{plan.hardware}: {plan.chips} chips, {plan.devices} devices, mesh {mesh}",
        f"  {plan.parameters:,} parameters, {plan.trained:,} train; {plan.tokens:,} tokens a step",
        f"  GiB a device: weights {plan.weights / GIB:.2f}, optimizer {plan.optimizer / GIB:.2f}, activations "
        f"{plan.activations / GIB:.2f}, in all {plan.total / GIB:.2f} of {plan.memory / GIB:.0f}: {verdict} with "
        f"{HEADROOM:.0%} to stay free ({free / plan.memory:.0%} is)",
        f"  GiB copied into other tiles once a step: {plan.retiled / GIB:.2f}",
        f"  lowered in {plan.lower_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s, "
        f"{plan.processor_seconds:.0f} processor seconds in all",
        f"  {plan.flops / 1e12:,.0f} TFLOP a step; at {UTILIZATION:.0%} of {plan.peak_flops / 1e12:.0f} TFLOP/s a "
        f"device {plan.tokens_per_second:,.0f} tokens/s; 2.1 T tokens in {days:.0f} days, "
        f"{days * 24 * plan.chips:,.0f} chip-hours",
    ]
    if plan.refused:
        lines.append(f"  the compiler makes no program: {plan.refused}")
    return "\n".join([*lines, *_predicted(plan), *checks.describe(plan.gates)])


def _predicted(plan: StepPlan) -> list[str]:
    """The time of a step by the compiled program, and what it consists of."""
    found = plan.predicted
    if found is None:
        return []
    sent = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in found.link_bytes.items()) or "none"
    uncounted = "".join(f"; {count} {what} not counted" for what, count in found.uncounted.items())
    return [
        f"  predicted {found.seconds:.2f} s a step, {plan.predicted_utilization:.0%} of the peak, limited by "
        f"{found.limit}: arithmetic {found.arithmetic:.2f} s, memory {found.memory:.2f} s, links {found.exposed:.2f} s "
        f"and {found.hidden:.2f} s more during other work{uncounted}",
        f"  GiB sent by each device, by collective: {sent}",
    ]


def as_json(plan: StepPlan) -> dict[str, Any]:
    """All figures, JSON values."""
    projected = {"total": plan.total, "fits": plan.fits, "tokens_per_second": plan.tokens_per_second}
    gates = {check.name: check.found for check in plan.gates}
    return utilized(plan._asdict() | projected | {"gates": gates, "predicted": as_figures(plan.predicted)})


def utilized(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with the share of the peak rate that the model's own FLOPs have of the predicted time."""
    if found := figures["predicted"]:
        possible = figures["peak_flops"] * figures["devices"] * found["seconds"]
        figures = figures | {"predicted": found | {"utilization": figures["flops"] / possible}}
    return figures
