"""Evaluation: any checkpoint on tasks, AR and diffusion side by side.

likelihood    log-probabilities of continuations: context | bound | blockwise
points        operating points, as --modes spells them
answering     a model at an operating point that scores and generates; answers, those known from before
served        the same, of a server
environment   what lm_eval and data sets read as they are imported
lm            lm_eval's model `twotower` on top of it
suite         lm_eval's tasks, at every point, question by question
paper         the eleven tasks of the published table, and where ours differ
code, running programs that a model wrote, run within limits
made          tasks made on the spot; long_context, those of growing length
speed         tokens per second, all points in turns
compare       paired differences, intervals, retained quality
report        results.json, a Markdown table, a plot

table         from names of tasks to results

Importing this registers the model `twotower` with lm_eval, if that is installed (extra `eval`), and imports no more of
it.
"""

import importlib.util

if importlib.util.find_spec("lm_eval") is not None:
    from lm_eval.api.registry import model_registry

    # Versions after 0.4.13 find it through the package's entry point.
    if "twotower" not in model_registry:
        model_registry.register("twotower", target="twotower_jax.evaluation.lm:TwoTowerLM")
