"""From a model that has read text to one that answers, on two CPU cores in some minutes and without a download.

    python launch/finetune_demo.py

Trains a small backbone and a denoiser on text such as "The city of Ada is Rome . What is the color of Leo ? red .",
then the denoiser on conversations about three people in four, and asks it about the others: it knows them from what it
read, and how to answer from the conversations. A second call goes on where the first one stopped.
docs/guide/finetuning.md says what the three runs are.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import itertools
import json
import pathlib
import random
import time

from absl import flags

from twotower_jax import command_line
from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.train.config import TrainConfig, base_config, freeze
from twotower_jax.train.loop import train

_WORKDIR = command_line.DEFINE_path("workdir", "runs/finetune_demo", "Where data and the three training runs go.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of each training; default: 200, 600 and 400.", lower_bound=1)

_BLOCK = 8
_NAMES = [
    "Ada", "Alan", "Anna", "Boris", "Carl", "Cleo", "Dora", "Edgar", "Ella", "Emil", "Fay", "Felix", "Gina",
    "Grace", "Hugo", "Ida", "Igor", "Iris", "Jack", "Jane", "Karl", "Kim", "Lea", "Leo", "Lily", "Mara", "Max",
    "Mia", "Nina", "Noah", "Olga", "Oscar", "Paul", "Pia", "Rosa", "Rudi", "Sara", "Theo", "Uma", "Vera",
]  # fmt: skip
_CITIES = ["Rome", "Oslo", "Paris", "Cairo", "Lima", "Delhi", "Tokyo", "Quito"]
_COLORS = ["blue", "red", "green", "black", "white", "pink", "brown", "gray"]
_FACTS = {name: (_CITIES[(n * 3 + n // 8) % 8], _COLORS[(n * 5 + n // 8 * 3) % 8]) for n, name in enumerate(_NAMES)}
_ASKED_LATER = _NAMES[::4]
_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant: ' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}

    {%- else %}
        {{- 'User: ' + message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""


def _turns(name: str) -> list[tuple[str, str]]:
    """The two questions about a person, with their answers."""
    city, color = _FACTS[name]
    return [
        (f"What is the city of {name} ?", f"It is {city} ."),
        (f"What is the color of {name} ?", f"It is {color} ."),
    ]


def _write_data(folder: pathlib.Path) -> None:
    """Text about everybody, and conversations of one or two questions about three in four."""
    draw = random.Random(0)
    facts = [
        fact
        for name, (city, color) in _FACTS.items()
        for what, value in (("city", city), ("color", color))
        for fact in (f"The {what} of {name} is {value} .", f"What is the {what} of {name} ? {value} .")
    ]
    texts = [{"text": " ".join(draw.choice(facts) for _ in range(8))} for _ in range(3000)]
    known = [turn for name in _NAMES if name not in _ASKED_LATER for turn in _turns(name)]
    talks = []
    for _ in range(1500):
        said = itertools.chain(*draw.sample(known, draw.choice((1, 2))))
        roles = itertools.cycle(("user", "assistant"))
        talks.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("text", texts), ("conversations", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(**changes) -> TrainConfig:
    config = base_config(
        model={
            "hidden_size": 64,
            "hybrid_override_pattern": "M*-*-",
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
        }
    )
    config.update(
        vocab_size=480,
        sequence_length=64,
        batch_size=16,
        block_size=_BLOCK,
        learning_rate=4e-3,
        final_learning_rate=4e-5,
        log_every=50,
        validation_fraction=0.02,
    )
    config.update(changes)
    if _STEPS.value is not None:
        config.steps = _STEPS.value
    return freeze(config)


def _stage(title: str, config: TrainConfig, workdir: pathlib.Path) -> None:
    print(f"\n== {title}\n", flush=True)
    train(config, workdir)


def _answers(checkpoint: pathlib.Path, template_folder: pathlib.Path, questions: list[str]) -> tuple[list[str], float]:
    """What a checkpoint answers, and its tokens per evaluation of the denoiser."""
    loaded = load(checkpoint)
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    template = ChatTemplate.load(template_folder, tokenizer)
    prompts = [
        template.encode([{"role": "user", "content": question}], add_generation_prompt=True).ids.tolist()
        for question in questions
    ]
    sampling = SamplingConfig(block_size=_BLOCK, steps_per_block=_BLOCK)
    settings = Settings(max_new_tokens=2 * _BLOCK, sampling=sampling, batch_size=len(prompts))
    results = list(generate(loaded.model, loaded.params, prompts, settings))
    decode = Decoder(tokenizer)
    tokens = sum(len(result.tokens) for result in results)
    return [decode(r.tokens).strip() for r in results], tokens / sum(r.denoiser_evaluations for r in results)


def main() -> None:
    started = time.monotonic()
    workdir = pathlib.Path(_WORKDIR.value)
    data, backbone, base, tuned = (workdir / name for name in ("data", "backbone", "base", "tuned"))
    _write_data(data)
    text, talks = str(data / "text.jsonl"), str(data / "conversations.jsonl")
    _stage("1. a backbone reads text", _config(data=text, steps=200), backbone)
    of_text = {"data": text, "objective": "denoiser", "init_from": str(backbone)}
    _stage("2. a denoiser on it", _config(**of_text, steps=600), base)
    # Its tokenizer's folder is where a template is looked for.
    (base / "chat_template.jinja").write_text(_TEMPLATE)
    of_talks = {"data": talks, "objective": "denoiser", "init_from": str(base), "sample_answers": 16}
    _stage("3. the denoiser on conversations", _config(**of_talks, sample_tokens=16, steps=400), tuned)

    print("\n== 4. questions about people of whom no conversation was\n")
    questions, wanted = zip(*(turn for name in _ASKED_LATER for turn in _turns(name)), strict=True)
    rows = []
    for name, checkpoint in (("before", base), ("after conversations", tuned)):
        said, rate = _answers(checkpoint, base, questions)
        exact = sum(a == b for a, b in zip(said, wanted, strict=True))
        rows.append((name, f"{exact}/{len(said)}", f"{rate:.2f}", said[0].splitlines()[0][:40] if said[0] else ""))
    print(f"|  | exact answers | tokens per evaluation | {questions[0]} |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\nAll of it took {time.monotonic() - started:.0f} s. Ask it yourself:")
    print(f"python launch/generate.py --checkpoint={tuned} --chat --block_size={_BLOCK} --max_new_tokens={2 * _BLOCK}")


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
