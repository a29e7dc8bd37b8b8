"""HumanEval and MBPP as tasks of lm_eval whose programs are run by running.py.

lm_eval's own files for them load a module of the Hub that runs programs in this process's neighbors without limits of
memory or network; nothing else differs, but for what is said in paper.py.
"""

from typing import Any

from twotower_jax.evaluation.running import run_program


def humaneval() -> dict[str, Any]:
    """HumanEval (Chen et al. 2021, arXiv 2107.03374), pass@1 of one greedy sample."""
    return {
        "task": "humaneval",
        "dataset_path": "openai/openai_humaneval",
        "unsafe_code": True,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "process_results": _passes_check,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def mbpp_sanitized() -> dict[str, Any]:
    """MBPP's sanitized part (Austin et al. 2021, arXiv 2108.07732), pass@1 of one greedy sample."""
    tests = "{% for test in test_list[:3] %}{{test}}\n{% endfor %}"
    return {
        "task": "mbpp_sanitized",
        "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "sanitized",
        "unsafe_code": True,
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n", "doc_to_target": "{{code}}\n[DONE]"},
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{prompt}} Your code should pass "
        f"these tests:\n\n{tests}[BEGIN]\n",
        "doc_to_target": "{{test_list | join('\n')}}",
        "target_delimiter": "",
        "process_results": _passes_tests,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 512, "do_sample": False},
        "num_fewshot": 3,
        "metadata": {"version": 1.0},
    }


def _passes_check(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_program(program).passed)}


def _passes_tests(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    program = "\n".join([*doc.get("test_imports", []), results[0], *doc["test_list"]])
    return {"pass@1": float(run_program(program).passed)}


TASKS = {"humaneval": humaneval, "mbpp_sanitized": mbpp_sanitized}
