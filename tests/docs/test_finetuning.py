"""The commands of docs/guide/finetuning.md, run one after the other as they stand there, at tiny size."""

import json
import re
import shlex

import pytest

from helpers import DATA, ROOT, run_command
from twotower_jax.checkpoint.export import export, model_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.two_tower import TwoTower

PAGE = (ROOT / "docs" / "guide" / "finetuning.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
# What makes a command tiny, in place of what the page says.
SAMPLING = ("--block_size=4", "--steps_per_block=1", "--max_new_tokens=4")
TINY = {
    "train": (
        *("--config.steps=1", "--config.batch_size=2", "--config.sequence_length=32", "--config.block_size=8"),
        "--config.validation_fraction=0",
    ),
    "prepare": ("--prompt_tokens=4", "--max_new_tokens=4", "--documents=4"),
    "generate": SAMPLING,
    "evaluate": ("--questions=2", "--speed_questions=1", "--rounds=1"),
    "reinforce": (
        *SAMPLING,
        *("--checkpoint=runs/denoiser", "--steps=1", "--prompts_per_step=1", "--group_size=2", "--rows=2"),
    ),
    "finetune_demo": ("--steps=1",),
    "compile": (),
    "export": (),
    "score": (),
    "visualize": (),
}
# Started, asked and stopped by tests/serving/test_adapters.py.
ELSEWHERE = {"serve"}


def commands(section: str) -> list[list[str]]:
    """The commands in a section's indented blocks, as words."""
    text = "\n".join(line[4:] for line in SECTIONS[section].splitlines() if line.startswith("    "))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python launch/")]


@pytest.fixture
def folder(tmp_path, small_config, random_params):
    """Where the page's commands find what they name: a denoiser, the backbone that it has, texts and conversations."""
    model = TwoTower(small_config("*E", vocab_size=512, eos_token_id=2))
    config = model.config.to_hf() | {"architectures": ["NemotronHTwoTowerForCausalLM"]}
    names = ("tokenizer.json", "tokenizer_config.json")
    small = {name: (DATA / "tiny" / "checkpoint" / name).read_bytes() for name in names}
    small["config.json"] = json.dumps(config).encode()
    (tmp_path / "runs" / "finetune_demo" / "data").mkdir(parents=True)
    write_folder(tmp_path / "runs" / "denoiser", model_tensors(model, random_params(model)), small, 2**30)
    export(tmp_path / "runs" / "denoiser", tmp_path / "runs" / "backbone", "context", 2**30)
    (tmp_path / "DIR").symlink_to("runs/denoiser")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = {
        "text": [{"text": f"The list object {i} " * 8} for i in range(16)],
        "conversations": [{"prompt": f"What is {i} ? ", "response": str(i)} for i in range(16)],
        "runs/finetune_demo/data/questions": [{"prompt": "The list", "response": "object"}],
        "runs/finetune_demo/data/held_out": [{"prompt": "A list", "response": "object"}],
        "rows": [{"text": "The list object"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.jsonl").write_bytes((tmp_path / "text.jsonl").read_bytes())
    return tmp_path


# The others' parts are each run by a test of their own in the slice.
@pytest.mark.whole(but=["Conversations"])
@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section_run(folder, section):
    asked = [words for words in commands(section) if (words[0].split("/")[1][:-3]) not in ELSEWHERE]
    assert asked
    for path, *flags in asked:
        script = path.removeprefix("launch/").removesuffix(".py")
        if script == "train" and not any(flag.startswith("--config.data=") for flag in flags):
            flags.append("--config.data=text.jsonl")
        if any(flag.startswith("--config.lora.rank=") for flag in flags):
            flags.append("--config.lora.rank=2")
        done = run_command(script, *flags, *TINY[script], cwd=folder, timeout=900)
        assert done.returncode == 0, (path, flags, done.stderr)
