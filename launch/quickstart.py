"""The method in miniature on two CPU cores, in some minutes and without a download.

    python launch/quickstart.py

Questions with exact answers, answered by a small two-tower model: by the context tower a token at a time (AR), and by
the denoiser tower in blocks (diffusion), to see how many of the right answers remain and how much faster that is. It
starts from the checkpoint in configs/quickstart/, which 104 minutes of training on such tasks made
(docs/reports/miniature.md), and trains its denoiser for a minute or two more; finds the fastest setting of diffusion
that keeps the accuracy, on questions for validation; and compares on questions of the test. `summary.json` holds the
result.

    python launch/quickstart.py --data=python

trains both towers from nothing on the documentation that ships with Python, and continues a few prompts. That text has
no right answers, and the model is too small to speak it well.

Either runs the code of the other commands; what it leaves in --workdir works with all of them. A second call goes on
where the first one stopped.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import dataclasses
import json
import pathlib
import time

from absl import flags

from twotower_jax import command_line

_WORKDIR = command_line.DEFINE_path(
    "workdir", "runs/quickstart", "Where the training runs go, and summary.json.", local=True
)
_DATA = flags.DEFINE_enum("data", "tasks", ["tasks", "python"], "Questions, or Python's documentation.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of each training; default: 60 on tasks, 320 on documentation.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "With --data=python: new tokens per prompt.", lower_bound=1
)
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "With --data=tasks: how many questions are answered together.")
_BLOCKS = flags.DEFINE_list("blocks", ["64"], "With --data=tasks: block sizes that are tried, with commas.")
_TASKS = flags.DEFINE_list(
    "tasks", ["letter", "getters", "sql", "sort"],
    "Of --data=tasks, those to train on and to ask; default: those that the denoiser has learned. The backbone answers "
    "spell and add as well.",
)  # fmt: skip
_QUESTIONS = flags.DEFINE_integer("questions", 20, "With --data=tasks: questions of each task.", lower_bound=1)

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.checkpoint.load import Loaded, load
from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.data import encode, load_tokenizer
from twotower_jax.data.tasks import TASKS
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.execution import Execution
from twotower_jax.generation import Result, Settings, generate
from twotower_jax.generation.answers import Examinee, Marks, answered, ask, fastest
from twotower_jax.outputs import output_file
from twotower_jax.train.config import TrainConfig, freeze, shipped, shipped_file
from twotower_jax.train.loop import train

# Training on tasks goes on where the checkpoint stopped: few steps, at a small rate.
_TASK_STEPS, _TASK_RATE = 60, 2e-4
# Thresholds that are tried, on a part of the questions; how much of AR's accuracy is to be kept.
_THRESHOLDS, _TRIED, _RETAINED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), 0.5, 0.99
_SHOWN = 3  # Answers whose steps are printed.
_MOST_TOKENS = 64  # In an answer; none has more, its end token included.

PROMPTS = (
    "Return a new list",
    "The str class",
    "Raise ValueError if the",
    "This module provides",
    "If the file cannot be opened",
    "A dictionary maps",
    "This function is called when",
    "Convert the argument to",
)
MODES = {
    "diffusion": "denoiser, a block of 16 at a time",
    "ar": "context tower, a token at a time",
    "mock_ar": "denoiser, a token at a time (a check)",
}


def _config(name: str, steps: int | None = None, **changes) -> TrainConfig:
    config = shipped(name)
    config.update(changes)
    chosen = steps if _STEPS.value is None else _STEPS.value
    if chosen is not None:
        config.steps = chosen
    return freeze(config)


def _stage(title: str, config: TrainConfig, workdir: pathlib.Path) -> list[str]:
    print(f"\n== {title}\n", flush=True)
    started = time.monotonic()
    result = train(config, workdir)
    metrics = result.metrics
    return [
        title,
        str(result.step),
        f"{metrics['loss']:.3f}",
        f"{metrics['validation_loss']:.3f}",
        f"{metrics['tokens_per_second']:,.0f}",
        f"{time.monotonic() - started:.0f} s",
    ]


def _timed(loaded: Loaded, prompts: list, settings: Settings) -> tuple[list[Result], float]:
    """Results, and the seconds of a second run, which compiles nothing."""
    list(generate(loaded.model, loaded.params, prompts, settings))
    started = time.monotonic()
    results = list(generate(loaded.model, loaded.params, prompts, settings))
    return results, time.monotonic() - started


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join(cells) + " |")


def _tasks(workdir: pathlib.Path, started: float) -> None:
    start = shipped_file("quickstart")
    print(f"The checkpoint in {start}, trained on these tasks before (docs/reports/miniature.md), and some more steps:")
    changes = {
        "objective": "answers",
        "init_from": str(start),
        "data": f"tasks:{','.join(_TASKS.value)}",
        "learning_rate": _TASK_RATE,
        "final_learning_rate": _TASK_RATE / 10,
    }
    stage = _stage("train the denoiser further", _config("quickstart", _TASK_STEPS, **changes), workdir / "denoiser")
    # Layers apart: they take longer to compile, and less time to run.
    loaded = load(workdir / "denoiser", execution=Execution(scan_layers=False))
    who = Examinee(loaded.model, loaded.params, load_tokenizer(loaded.tokenizer_folder))
    sampling = _tuned(who)
    answers = _compared(who, sampling)
    _show_steps(who, sampling)
    print("== What happened\n")
    _print_table(["stage", "steps", "loss", "validation loss", "tokens/s", "time"], [stage])
    print()
    _report(answers, sampling, workdir, started)


def _settings(sampling: SamplingConfig | None, batch: int) -> Settings:
    """AR's settings, or those of diffusion with a sampling."""
    settings = Settings(mode="ar", max_new_tokens=_MOST_TOKENS, batch_size=batch)
    return settings if sampling is None else dataclasses.replace(settings, mode="diffusion", sampling=sampling)


def _tuned(who: Examinee) -> SamplingConfig:
    """The fastest setting of diffusion that keeps AR's accuracy on questions for validation, one at a time."""
    count = max(1, round(_TRIED * _QUESTIONS.value))
    print(f"\n== choose the setting, on {count * len(_TASKS.value)} questions for validation\n", flush=True)
    asked = ask(who.tokenizer, _TASKS.value, "validation", count)
    samplings = {
        f"blocks of {block}, threshold {threshold}": SamplingConfig(block, block, confidence_threshold=threshold)
        for block in command_line.numbers(_BLOCKS, int)
        for threshold in _THRESHOLDS
    }
    ways = {"AR": None} | samplings
    found = answered(who, asked, {name: _settings(sampling, 1) for name, sampling in ways.items()}, rounds=1)
    ar = found.pop("AR")
    best = fastest(ar, found, _RETAINED)
    rows = [[name, *_numbers(answers), "chosen" if name == best else ""] for name, answers in found.items()]
    _print_table(["setting", "accuracy", "tokens per evaluation", "tokens/s", ""], [["AR", *_numbers(ar), ""], *rows])
    return samplings[best]


def _numbers(answers: Marks) -> list[str]:
    each = answers.tokens_per_evaluation
    return [f"{answers.accuracy:.1%}", "-" if each is None else f"{each:.2f}", f"{answers.tokens_per_second:,.0f}"]


def _compared(who: Examinee, sampling: SamplingConfig) -> dict[int, dict[str, Marks]]:
    """AR and diffusion on the questions of the test: batch size → mode → answers, timed task by task."""
    count = _QUESTIONS.value
    print(f"\n== compare, on {count * len(_TASKS.value)} questions of the test\n", flush=True)
    found = {}
    for batch in command_line.numbers(_BATCHES, int):
        ways = {"ar": _settings(None, batch), "diffusion": _settings(sampling, batch)}
        of_tasks = [answered(who, ask(who.tokenizer, [task], "test", count), ways) for task in _TASKS.value]
        found[batch] = {way: Marks.joined([marks[way] for marks in of_tasks]) for way in ways}
    return found


def _show_steps(who: Examinee, sampling: SamplingConfig) -> None:
    """Three answers as they resolve: a line for each evaluation of a block."""
    for task in _TASKS.value[:_SHOWN]:
        (question,) = ask(who.tokenizer, [task], "test", 1, seed=1)
        settings = _settings(sampling, 1)
        (result,) = generate(who.model, who.params, [question.ids], settings, record_trace=True)
        print(question.prompt)
        for step in result.trace:
            parts = (who.tokenizer.decode([i]) if i != step.mask_token_id else "░" for i in step.tokens)
            print(f"  block {step.block + 1}, evaluation {step.step + 1}: {''.join(parts)!r}")
        print()


def _speed(ar: Marks, diffusion: Marks) -> list[str]:
    times = diffusion.tokens_per_second / ar.tokens_per_second
    return [f"{diffusion.tokens_per_evaluation:.1f}", f"{times:.2f}"]


def _report(found: dict[int, dict[str, Marks]], sampling: SamplingConfig, workdir: pathlib.Path, started: float):
    """Prints the comparison, and writes summary.json."""
    first, *_ = found
    ar, diffusion = found[first]["ar"], found[first]["diffusion"]
    rows = []
    for task in _TASKS.value:
        pair = ar.of(task), diffusion.of(task)
        rows.append([task, *(f"{marks.accuracy:.0%}" for marks in pair), *_speed(*pair)])
    rows.append(["all", f"{ar.accuracy:.1%}", f"{diffusion.accuracy:.1%}", *_speed(ar, diffusion)])
    _print_table(["task", "AR answers right", "diffusion", "tokens per evaluation", "times AR's speed"], rows)
    print()
    speedups, rows = {}, []
    for batch, modes in found.items():
        speeds = [modes[mode].tokens_per_second for mode in ("ar", "diffusion")]
        speedups[batch] = speeds[1] / speeds[0]
        rows.append([str(batch), *(f"{speed:,.0f}" for speed in speeds), f"{speedups[batch]:.2f}"])
    _print_table(["questions together", "AR, tokens/s", "diffusion, tokens/s", "times"], rows)
    retained = diffusion.accuracy / ar.accuracy if ar.accuracy else None
    summary = {
        "accuracy": {"ar": ar.accuracy, "diffusion": diffusion.accuracy},
        "retained_quality": retained,
        "speedup": speedups[first],
        "tokens_per_evaluation": diffusion.tokens_per_evaluation,
        "seconds": time.monotonic() - started,
        "speedup_by_batch": {str(batch): value for batch, value in speedups.items()},
        "tasks": {t: {"ar": ar.of(t).accuracy, "diffusion": diffusion.of(t).accuracy} for t in _TASKS.value},
        "block_size": sampling.block_size,
        "confidence_threshold": sampling.confidence_threshold,
        "questions": len(ar.right),
    }
    with output_file(workdir / "summary.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")
    kept = "no right answer of AR to keep" if retained is None else f"{retained:.1%} of AR's accuracy kept"
    print(
        f"\n{kept}, at {speedups[first]:.2f} times its tokens per second, "
        f"{'one question' if first == 1 else f'{first} questions'} at a time "
        f"({summary['seconds']:.0f} s in all; {workdir / 'summary.json'})"
    )


def _documentation(workdir: pathlib.Path) -> None:
    backbone, denoiser = workdir / "backbone", workdir / "denoiser"
    stages = [
        _stage("1. pretrain a backbone, next tokens", _config("tiny", objective="autoregressive"), backbone),
        _stage(
            "2. train a denoiser on it, masked tokens",
            _config("tiny", objective="denoiser", init_from=str(backbone)),
            denoiser,
        ),
    ]

    print("\n== 3. generate\n", flush=True)
    loaded = load(denoiser)
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    prompts = encode(tokenizer, PROMPTS)
    rows = []
    for mode, what in MODES.items():
        settings = Settings(
            mode=mode,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            sampling=SamplingConfig(block_size=16, steps_per_block=16),
            batch_size=len(PROMPTS),
            ignore_eos=True,
        )
        results, seconds = _timed(loaded, prompts, settings)
        print(f"-- {mode}: {what}\n{PROMPTS[0]}{tokenizer.decode(results[0].tokens)}\n", flush=True)
        new = sum(len(r.tokens) for r in results)
        evaluations = sum(r.denoiser_evaluations for r in results)
        per_evaluation = f"{new / evaluations:.2f}" if evaluations else "-"
        rows.append([f"{mode}: {what}", per_evaluation, f"{new / seconds:,.0f}"])

    print("== What happened\n")
    _print_table(["stage", "steps", "loss", "validation loss", "tokens/s", "time"], stages)
    print()
    _print_table([f"mode, {len(PROMPTS)} prompts together", "tokens per denoiser evaluation", "tokens/s"], rows)
    print(f"\nMore of it: python launch/generate.py --checkpoint={denoiser} --prompt='The list object'")


def main() -> None:
    started, workdir = time.monotonic(), pathlib.Path(_WORKDIR.value)
    if _DATA.value == "python":
        command_line.refuse_given([_BATCHES, _BLOCKS, _TASKS, _QUESTIONS], "with --data=python")
        _documentation(workdir)
    else:
        command_line.refuse_given([_MAX_NEW_TOKENS], "with --data=tasks")
        # Before minutes of training.
        for holder in (_BATCHES, _BLOCKS):
            command_line.numbers(holder, int, least=1)
        if not _TASKS.value:
            raise ValueError(f"--tasks is empty; choose among {', '.join(TASKS)}")
        _tasks(workdir, started)


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
