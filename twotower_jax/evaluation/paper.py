"""The published table: eleven tasks, lm_eval's names for them, and where ours differ.

The scores are those of the card of nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16, in percent, with S = 16 and
γ = 0.8. It names tasks, shots and metrics; the prompts, answers' patterns and splits are not published, so that these
are lm_eval 0.4.13's. Scores of one checkpoint can be compared between its modes here, and with the published ones only
roughly.
"""

from typing import Any, NamedTuple

from twotower_jax.evaluation import code

_GLOBAL = ["ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "sw", "yo", "zh"]
_MGSM = ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]


class PaperTask(NamedTuple):
    """One line of the table.

    Attributes:
      name: ours. title: the card's.
      parts: lm_eval's tasks or groups, or one's own; their questions are pooled.
      metric: that stands for it, as `suite.TaskScores` names it.
      shots: examples before each question.
      ar, two_tower: published scores, in percent.
      differs: what is known to differ or is not published.
    """

    name: str
    title: str
    parts: tuple[str | dict[str, Any], ...]
    metric: str
    shots: int
    ar: float
    two_tower: float
    differs: str = ""


TASKS = (
    PaperTask("mmlu", "MMLU", ("mmlu",), "acc", 5, 78.56, 78.24, "all questions count alike"),
    PaperTask(
        "mmlu_pro", "MMLU-Pro", ("mmlu_pro",), "exact_match", 5, 62.59, 60.93, "CoT; 'answer is (X)' must be there"
    ),
    PaperTask("arc_challenge", "ARC-C", ("arc_challenge",), "acc_norm", 25, 91.72, 92.66, "normalized by characters"),
    PaperTask("winogrande", "WinoGrande", ("winogrande",), "acc", 5, 76.09, 76.09, "the validation split"),
    PaperTask("race", "RACE", ("race",), "acc", 0, 88.90, 88.90, "RACE-high, one question of each passage"),
    PaperTask(
        "humaneval", "HumanEval", (code.humaneval(),), "pass@1", 0, 79.27, 75.58, "one greedy sample, by running.py"
    ),
    PaperTask(
        "mbpp_sanitized", "MBPP-Sanitized", (code.mbpp_sanitized(),), "pass@1", 3, 74.71, 74.28,
        "one greedy sample; lm_eval has the full set alone, whose prompt this is",
    ),
    PaperTask("gsm8k", "GSM8K", ("gsm8k",), "exact_match,flexible-extract", 8, 92.49, 90.14, "the last number counts"),
    PaperTask(
        "minerva_math500", "MATH-500", ("minerva_math500",), "math_verify", 4, 84.40, 80.60,
        "needs lm_eval[math]: sympy and math_verify",
    ),
    PaperTask(
        "mmlu_global_lite", "MMLU Global Lite", tuple(f"global_mmlu_{language}" for language in _GLOBAL), "acc", 5,
        73.97, 73.94, "which languages were taken is not published; these are lm_eval's fifteen",
    ),
    PaperTask(
        "mgsm", "MGSM", tuple(f"mgsm_native_cot_{language}" for language in _MGSM), "exact_match,flexible-extract", 8,
        80.80, 80.40, "CoT in the language of the question; the last number counts",
    ),
)  # fmt: skip
BY_NAME = {task.name: task for task in TASKS}


def published_retained() -> float:
    """The published retained quality: the mean of TwoTower over the mean of AR."""
    return sum(task.two_tower for task in TASKS) / sum(task.ar for task in TASKS)
