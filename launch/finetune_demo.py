"""From a model that has read text to one that answers, on two CPU cores in some minutes and without a download.

    python launch/finetune_demo.py

Trains a small backbone and a denoiser on sentences such as "3 plus 4 is 7.", then the denoiser on conversations about
some of these sums, and asks it about sums that no conversation was about: it knows them from what it read, and how to
answer from the conversations. A second call goes on where the first one stopped. docs/guide/finetuning.md says what the
three runs are, and how launch/reinforce.py goes on with the last one.
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

_WORKDIR = command_line.DEFINE_path(
    "workdir", "runs/finetune_demo", "Where data and the three training runs go.", local=True
)
_STEPS = flags.DEFINE_integer("steps", 400, "Steps of each training.", lower_bound=1)
_PADDING = flags.DEFINE_list(
    "padding_weights", ["0.1"], "Train on conversations with each of these values of padding_weight."
)

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.train.config import TrainConfig, base_config, freeze
from twotower_jax.train.loop import train

_NUMBERS, _BLOCK = range(10), 8
# One sum in four is asked about in no conversation; every other one of these is held out from launch/reinforce.py too.
_PAIRS = list(itertools.product(_NUMBERS, _NUMBERS))
_ASKED_LATER = _PAIRS[::4]
_HELD_OUT = _ASKED_LATER[1::2]
_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant: ' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}

    {%- else %}
        {{- 'User: ' + message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""


def _question(a: int, b: int) -> str:
    return f"What is {a} plus {b} ?"


def _answer(a: int, b: int) -> str:
    return f"It is {a + b} ."


def _write_data(folder: pathlib.Path) -> None:
    """Text with all sums, conversations of one or two questions about three in four of them, and single questions with
    what is wanted."""
    draw, numbers = random.Random(0), list(_NUMBERS)

    def sentence() -> str:
        a, b = draw.choice(numbers), draw.choice(numbers)
        return draw.choice((f"We know that {a} plus {b} is {a + b} .", f"What is {a} plus {b} is {a + b} ."))

    texts = [{"text": " ".join(sentence() for _ in range(8))} for _ in range(3000)]
    asked = [pair for pair in _PAIRS if pair not in _ASKED_LATER]
    talks = []
    for _ in range(1500):
        pairs = draw.sample(asked, draw.choice((1, 2)))
        turns = [(("user", _question(*pair)), ("assistant", _answer(*pair))) for pair in pairs]
        talks.append({"messages": [{"role": r, "content": c} for r, c in itertools.chain(*turns)]})
    written = {"text": texts, "conversations": talks}
    rewarded = [pair for pair in _PAIRS if pair not in _HELD_OUT]
    for name, pairs in (("questions", rewarded), ("held_out", _HELD_OUT)):
        written[name] = [{"prompt": f"User: {_question(*p)}\nAssistant: ", "response": _answer(*p)} for p in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
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
        vocab_size=320,
        sequence_length=64,
        batch_size=16,
        block_size=_BLOCK,
        steps=_STEPS.value,
        learning_rate=4e-3,
        final_learning_rate=4e-5,
        log_every=50,
        validation_fraction=0.02,
    )
    config.update(changes)
    return freeze(config)


def _stage(title: str, config: TrainConfig, workdir: pathlib.Path) -> None:
    print(f"\n== {title}\n", flush=True)
    train(config, workdir)


def _answers(checkpoint: pathlib.Path, template_folder: pathlib.Path) -> tuple[list[str], float]:
    """What a checkpoint answers to the questions that no conversation holds, and its tokens per evaluation."""
    loaded = load(checkpoint)
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    template = ChatTemplate.load(template_folder, tokenizer)
    prompts = [
        template.encode([{"role": "user", "content": _question(*pair)}], add_generation_prompt=True).ids.tolist()
        for pair in _ASKED_LATER
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
    data, backbone, base = (workdir / name for name in ("data", "backbone", "base"))
    text, talks = str(data / "text.jsonl"), str(data / "conversations.jsonl")
    first = _config(data=text)
    conversations = {"data": talks, "objective": "denoiser", "init_from": str(base), "learning_rate": 2e-3}
    conversations |= {"sample_answers": 16, "sample_tokens": 16}
    weights = command_line.numbers(_PADDING, float)
    tuning = {workdir / _tuned(weight): _config(**conversations, padding_weight=weight) for weight in weights}
    _write_data(data)
    _stage("1. a backbone reads text", first, backbone)
    _stage("2. a denoiser on it", _config(data=text, objective="denoiser", init_from=str(backbone)), base)
    # Its tokenizer's folder is where a template is looked for.
    (base / "chat_template.jinja").write_text(_TEMPLATE)
    asked = {"before conversations": base}
    for tuned, config in tuning.items():
        said = f", padding_weight={config.padding_weight}" if len(tuning) > 1 else ""
        _stage(f"3. the denoiser on conversations{said}", config, tuned)
        asked[f"after{said}"] = tuned

    print("\n== 4. questions that no conversation was about\n")
    wanted, wide = [_answer(*pair) for pair in _ASKED_LATER], max(map(len, asked))
    print(f"| {'':{wide}} | {'exact':>7} | tokens per evaluation | {_question(*_ASKED_LATER[-1]):24} |")
    print(f"| {'-' * wide} | {'-' * 7} | {'-' * 21} | {'-' * 24} |")
    for name, checkpoint in asked.items():
        said, rate = _answers(checkpoint, base)
        exact = sum(a == b for a, b in zip(said, wanted, strict=True))
        shown = said[-1] if len(said[-1]) <= 24 else said[-1][:21] + "..."
        print(f"| {name:{wide}} | {exact:>3}/{len(said)} | {rate:21.2f} | {json.dumps(shown)[1:-1]:24} |")
    print(f"\nAll of it took {time.monotonic() - started:.0f} s. Ask it yourself:")
    print(
        f"python launch/generate.py --checkpoint={next(iter(tuning))} --chat --block_size={_BLOCK} "
        f"--max_new_tokens={2 * _BLOCK}"
    )


def _tuned(padding_weight: float) -> str:
    """The name of a workdir."""
    return "tuned" if padding_weight == TrainConfig.padding_weight else f"tuned-{padding_weight:g}"


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
