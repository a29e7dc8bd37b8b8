"""Evaluates a checkpoint on tasks, AR and diffusion side by side on the same questions.

    python launch/evaluate.py --checkpoint=DIR --tasks=gsm8k,arc_challenge --output=evaluation
    python launch/evaluate.py --checkpoint=DIR --tasks=paper --modes=ar,diffusion:confidence_threshold=0.9 --output=out
    python launch/evaluate.py --checkpoint=DIR --tasks=needle,key_value --lengths=512,2048,8192 --output=evaluation
    python launch/evaluate.py --base_url=http://127.0.0.1:8000 --tasks=gsm8k --output=evaluation

Tasks are lm_eval's, by name, and those of --include_path; `paper` is the published table's eleven; `tasks`, needle and
key_value are made on the spot. Each of --modes is a mode and, after colons, what differs from the flags. The folder
gets results.json, table.md and plot.svg. Answers are kept in it as they come: the same command goes on where it was
interrupted.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import dataclasses
import datetime
import hashlib
import json
import pathlib
import sys

from absl import flags

from twotower_jax import adapter_flags, command_line, generation_flags, model_flags
from twotower_jax.choices import MODES

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(generation_flags)
flags.adopt_module_key_flags(adapter_flags)
_TASKS = flags.DEFINE_list("tasks", None, "Names, several with commas: see above.", required=True)
_INCLUDE_PATH = command_line.DEFINE_path("include_path", None, "A folder of task files of your own.", local=True)
_MODES = flags.DEFINE_list(
    "modes", ["ar", "diffusion"], f"MODE:SETTING=VALUE:…, several with commas; modes are {', '.join(MODES)}."
)
_LIKELIHOOD = flags.DEFINE_enum(
    "likelihood", "context", ["context", "bound", "blockwise"],
    "Of choices and texts: the context tower's, exact; in diffusion also a bound of the denoiser's, or exactly its own "
    "in the order in which it commits. See docs/guide/evaluation.md.",
)  # fmt: skip
_SAMPLES = flags.DEFINE_integer("likelihood_samples", 32, "Draws of --likelihood=bound.", lower_bound=2)
_OUTPUT = command_line.DEFINE_path("output", None, "Folder for the results; made if it does not exist.", required=True)
_LIMIT = flags.DEFINE_integer("limit", None, "At most so many questions of each task or part of one.", lower_bound=1)
_SHOTS = flags.DEFINE_integer("num_fewshot", None, "Examples before each question; default: the task's.", lower_bound=0)
_CHAT = flags.DEFINE_bool("chat", False, "Put questions into the checkpoint's chat template.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed together; no answer depends on it.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens of a question; longer ones lose their beginning. Default: no limit.", lower_bound=2
)
_RUN_CODE = flags.DEFINE_bool(
    "run_generated_code", False, "Run programs that the model writes, within limits of time and memory."
)
_QUESTIONS = flags.DEFINE_integer("questions", 100, "Of each task that is made on the spot.", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", ["256", "512", "1024"], "Tokens of the contexts of needle and key_value.")
_SPEED_QUESTIONS = flags.DEFINE_integer(
    "speed_questions", 16, "Questions to measure speeds with; 0: none.", lower_bound=0
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs of each point, of which the median counts.", lower_bound=1)
_BASE_URL = flags.DEFINE_string("base_url", None, "Ask this server, in OpenAI's protocol, instead of a checkpoint.")
_MODEL = flags.DEFINE_string("model", None, "With --base_url: its name there; default: the first that is served.")
# With --base_url there is no checkpoint.
flags.FLAGS["checkpoint"].validators.clear()

if __name__ == "__main__":
    command_line.read_flags()

import jax

from twotower_jax import model_from_flags, settings_from_flags, strategy_flags
from twotower_jax.data import load_tokenizer
from twotower_jax.evaluation.environment import settle_environment
from twotower_jax.generation.settings import Settings
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.outputs import output_folder, write_file
from twotower_jax.paths import as_path, local_path

_MAX_GEN_TOKS = 256
_ANSWERS = "answers.jsonl"


def main() -> None:
    strategy_flags.register()
    settle_environment()
    command_line.refuse_given([generation_flags.MODE], "here: give --modes")
    if (_BASE_URL.value is None) == (not model_flags.CHECKPOINT.present):
        raise ValueError("give either --checkpoint=DIR or --base_url=URL")
    if _BASE_URL.value is None:
        command_line.refuse_given([_MODEL], "without --base_url")
    else:
        adapters = adapter_flags.ADAPTER, adapter_flags.ADAPTER_TOWER
        command_line.refuse_given(adapters, "with --base_url: --model names one that is served")
    # Imported when the environment is settled.
    from twotower_jax.evaluation.points import parse_points
    from twotower_jax.evaluation.table import evaluate, find_tasks

    most = generation_flags.MAX_NEW_TOKENS
    base = Settings(batch_size=_BATCH_SIZE.value)
    if _BASE_URL.value is None:
        base = settings_from_flags.settings(batch_size=_BATCH_SIZE.value)
    points = parse_points(_MODES.value, base)
    with output_folder(_OUTPUT.value, _ANSWERS) as output:
        tasks = find_tasks(
            _TASKS.value,
            include_path=_INCLUDE_PATH.value,
            shots=_SHOTS.value,
            run_code=_RUN_CODE.value,
            lengths=sorted(set(command_line.numbers(_LENGTHS, int))),
            count=_QUESTIONS.value,
            seed=base.seed,
        )
        try:
            answerers, folder = _served(points, output) if _BASE_URL.value else _local(points, output)
            done = evaluate(
                tasks,
                answerers,
                ar=next((point.name for point in points if point.mode == "ar"), None),
                folder=folder,
                limit=_LIMIT.value,
                chat=_CHAT.value,
                run_code=_RUN_CODE.value,
                max_new_tokens=most.value if most.present else _MAX_GEN_TOKS,
                max_length=_MAX_LENGTH.value,
                speed_questions=_SPEED_QUESTIONS.value,
                rounds=_ROUNDS.value,
                report=lambda message: print(message, file=sys.stderr, flush=True),
            )
        except FloatingPointError as error:
            source = _BASE_URL.value or model_flags.CHECKPOINT.value
            command_line.fail(f"{source}: {error}", command_line.BROKEN_CHECKPOINT)
        finally:
            answers = output / _ANSWERS
            if answers.is_file() and not answers.stat().st_size:
                answers.unlink()
        done.about |= _about(points)
        table = done.markdown()
        write_file(output / "results.json", json.dumps(done.results(), indent=2, ensure_ascii=False) + "\n")
        write_file(output / "table.md", table)
        write_file(output / "plot.svg", done.plot())
        for kind in ("needle", "key_value"):
            if (picture := done.length_plot(kind)) is not None:
                write_file(output / f"{kind}.svg", picture)
    print(table)


def _local(points, output: pathlib.Path):
    """A model of this process at each point, and the folder of its tokenizer."""
    from twotower_jax.evaluation.answering import Local, check_likelihood
    from twotower_jax.evaluation.answers import Answers, fingerprint

    for point in points:
        check_likelihood(_LIKELIHOOD.value, point.settings)
    adapter = adapter_flags.given()
    loaded = model_from_flags.load_model(**adapter)
    tokenizer = load_tokenizer(loaded.folder)
    checkpoint = as_path(model_flags.CHECKPOINT.value)
    how = [model_flags.DTYPE.value, model_flags.QUANTIZE.value, model_flags.KERNELS.value]
    # Strategies of one's own: another file gives other answers.
    own = [pathlib.Path(local_path(path)).read_bytes() for path in strategy_flags.REGISTER.value]
    how += [hashlib.sha256(content).hexdigest() for content in own]
    if (beside := adapter["adapter"]) is not None:
        how += [fingerprint(beside), adapter["adapter_tower"]]
    answers = Answers(output / _ANSWERS, [fingerprint(checkpoint), *how])
    _warn(points, loaded.folder)
    answerers = {
        point.name: Local(
            loaded.model,
            loaded.params,
            tokenizer,
            point.settings,
            placement=loaded.placement,
            likelihood=_LIKELIHOOD.value,
            samples=_SAMPLES.value,
            answers=answers,
            label=point.name,
        )
        for point in points
    }
    return answerers, loaded.folder


def _served(points, output: pathlib.Path):
    """The server at each point; nothing is known of its folder."""
    from twotower_jax.evaluation.answers import Answers
    from twotower_jax.evaluation.served import Served

    if _LIKELIHOOD.value != "context":
        raise ValueError(f"--likelihood={_LIKELIHOOD.value}: a server tells the context tower's alone")
    if _CHAT.value:
        raise ValueError("--chat needs the checkpoint's template: give --checkpoint=DIR")
    answers = Answers(output / _ANSWERS)
    options = {"together": _BATCH_SIZE.value, "model": _MODEL.value, "answers": answers}
    return {
        point.name: Served(_BASE_URL.value, {"mode": point.mode} | point.given, label=point.name, **options)
        for point in points
    }, None


def _warn(points, folder: pathlib.Path) -> None:
    trained = trained_block_size(folder)
    for point in points:
        size = point.settings.sampling.block_size
        if point.mode in ("diffusion", "speculative") and trained is not None and size > trained:
            print(
                f"warning: {point.name}: blocks of {size} are larger than the {trained} that the denoiser was trained "
                "with; samples of larger blocks collapse",
                file=sys.stderr,
            )
    if any(point.mode != "ar" for point in points):
        modes = ",".join(point.name for point in points if point.mode != "ar")
        model_from_flags.warn_if_untrained(folder, f"--modes={modes}", "--modes=ar is the backbone itself")


def _about(points) -> dict:
    about = {
        "source": _BASE_URL.value or str(model_flags.CHECKPOINT.value),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "limit": _LIMIT.value,
        "points": {point.name: dataclasses.asdict(point.settings) for point in points},
    }
    if _BASE_URL.value is None:
        about |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "dtype": model_flags.DTYPE.value}
    if _RUN_CODE.value:
        from twotower_jax.evaluation.running import without_network

        network = "no network" if without_network() else "the network of this machine"
        about["programs"] = f"programs ran with {network}, 10 s and 1 GB each"
    return about


if __name__ == "__main__":
    command_line.run(main)
