"""data/chat.py and generate.py --chat: texts and tokens of conversations, as the template's maker meant them."""

import io
import json
import re
import shutil

import numpy as np
import pytest

from helpers import run_command
from twotower_jax.data import load_tokenizer, save_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.files import CheckpointError
from twotower_jax.generation.conversation import read_conversations, typed_turns

# With blocks that trim, as published ones are written; </s> is a special token of the tokenizer below.
TURNS = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<' + message.role + '>' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}

    {%- else %}
        {{- '<' + message.role + '>' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
TOOLS = """{{ bos_token }}{% for tool in tools %}
{% if loop.index > 2 %}{% break %}{% endif %}
{{ tool | tojson }}
{% endfor %}{{ messages | length }} {{ strftime_now('%Y') | length }}
{%- set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Über."},
]
TALK_TEXT = "<system>Be brief.</s><user>2 < 3?</s><assistant>Yes.</s><user>Sure?</s><assistant>Über.</s>"
SPECS = [{"name": "é<b>", "n": 1}, {"b": None, "a": [1.5, True]}, {"name": "not shown"}]


@pytest.fixture
def folder(tmp_path, data):
    """The small model's tokenizer, of 512 tokens, without a template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(data / "tiny" / "checkpoint" / name, tmp_path)
    return tmp_path


def with_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def load(folder) -> ChatTemplate:
    return ChatTemplate.load(folder, load_tokenizer(folder))


def test_a_conversation_as_text(folder):
    template = load(with_config(folder, chat_template=TURNS))
    assert template.render(TALK) == TALK_TEXT
    assert template.render(TALK[:2], True) == "<system>Be brief.</s><user>2 < 3?</s><assistant>"
    assert template.marks_assistant


def test_tokens_and_whose_they_are(folder):
    """Special tokens of the template are one token each; the marked ones spell what the assistant said, and no more."""
    template, tokenizer = load(with_config(folder, chat_template=TURNS)), load_tokenizer(folder)
    encoded = template.encode(TALK)
    assert encoded.ids.dtype == np.int32 and encoded.assistant.dtype == bool
    assert tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False) == TALK_TEXT
    assert (encoded.ids == 2).sum() == 5
    runs = np.flatnonzero(np.diff(np.pad(encoded.assistant.astype(int), 1)))
    spoken = [
        tokenizer.decode(encoded.ids[start:stop].tolist(), skip_special_tokens=False)
        for start, stop in zip(runs[::2], runs[1::2], strict=True)
    ]
    assert spoken == ["Yes.</s>", "Über.</s>"]


def test_tools_and_what_templates_may_call(folder):
    """Two of three tools, HTML and accents as they are; the year has four digits."""
    named = [{"name": "default", "template": TURNS}, {"name": "tool_use", "template": TOOLS}]
    template = load(with_config(folder, chat_template=named, bos_token={"content": "<s>"}))
    shown = '<s>{"name": "é<b>", "n": 1}\n{"b": null, "a": [1.5, true]}\n5 42'
    assert template.render(TALK, tools=SPECS) == shown
    assert template.render(TALK) == TALK_TEXT


def test_a_file_of_its_own_comes_first(folder):
    with_config(folder, chat_template="from the configuration")
    (folder / "chat_template.jinja").write_text("{% if true %}\nfrom the file\n  {% endif %}")
    assert load(folder).render(TALK) == "from the file\n"


def test_reasoning_under_every_name_and_nulls_left_out(folder):
    source = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'content' in m }};{% endfor %}"
    template = load(with_config(folder, chat_template=source))
    messages = [{"role": "assistant", "content": None, name: "so"} for name in ("reasoning", "thinking")]
    assert template.render(messages) == "so|so|False;so|so|False;"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation"),
        ("{% for", "is not valid Jinja"),
        ("{% generation %}open", "is not valid Jinja"),
    ],
)
def test_templates_that_fail_say_so(folder, source, said):
    with pytest.raises(ValueError, match=said):
        load(with_config(folder, chat_template=source)).render(TALK)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "no chat template"),
        (["x"], "none of the chat templates|no chat template"),
        (7, "must be a text"),
        ([{"name": "default", "template": None}], "must be a text"),
        ([{"name": "tool_use", "template": "x"}], "named 'default'"),
    ],
)
def test_what_is_no_template(folder, given, said):
    with pytest.raises(ValueError, match=said):
        load(with_config(folder, chat_template=given))


def test_nobody_but_the_assistant_spells_a_special_token(folder):
    """A user who could would end the turn, and speak as the system."""
    template = load(with_config(folder, chat_template=TURNS))
    for spelled in ("a</s>b", [{"type": "text", "text": "a</s>b"}]):
        with pytest.raises(ValueError, match="message 1 .user. spells the special token '</s>'"):
            template.encode([{"role": "user", "content": spelled}])
    with pytest.raises(ValueError, match="tools spells"):
        template.render(TALK, tools=[{"<s>": 1}])
    assert "so</s>" in template.render([{"role": "assistant", "content": "so"}])


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "x"}], [{"role": 1}], ["x"], None])
def test_what_is_no_conversation(folder, messages):
    with pytest.raises(ValueError, match="message"):
        load(with_config(folder, chat_template=TURNS)).render(messages)


def test_a_conversation_that_is_no_text_is_refused(folder):
    """As a terminal of another encoding gives, and JSON can spell."""
    template = load(with_config(folder, chat_template=TURNS))
    for text, what in (("caf\udce9", "byte 0xe9, not UTF-8"), ("half \ud800", "half a pair")):
        with pytest.raises(ValueError, match=f"the conversation: is no text at character .*{what}"):
            template.encode([{"role": "user", "content": text}])


@pytest.mark.parametrize("content", ['{"chat_template": 5}', '{"chat_template": "{{"}', "[]", "{"])
def test_a_broken_template_is_told_from_none(folder, content):
    """Status 3, and not 2."""
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        load(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no chat template") as error:
        load(folder)
    assert not isinstance(error.value, CheckpointError)


def test_conversations_of_a_file(tmp_path):
    row = {"messages": TALK}
    for name, text in (("a.json", json.dumps(row)), ("b.json", json.dumps([row])), ("c.jsonl", json.dumps(row) + "\n")):
        (tmp_path / name).write_text(text)
        assert read_conversations(tmp_path / name) == [row]
    for text in ("[]", "[7]", '{"text": "x"}', '{"messages": []}', "{"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bad.json"))):
            read_conversations(tmp_path / "bad.json")


def test_typed_turns_end_with_exit_or_the_input():
    asked = []
    assert list(typed_turns(io.StringIO("one\n\n  \n two \n/exit\nthree\n"), lambda: asked.append(1))) == ["one", "two"]
    assert len(asked) == 5
    assert list(typed_turns(io.StringIO("last"), lambda: None)) == ["last"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, small_folder):
    checkpoint = shutil.copytree(small_folder, tmp_path_factory.mktemp("chat") / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(TURNS)
    return checkpoint


def generate(checkpoint, *flags, typed: str = ""):
    words = [f"--checkpoint={checkpoint}", "--chat", "--mode=ar", "--max_new_tokens=4", "--ignore_eos", *flags]
    return run_command("generate", *words, input=typed)


@pytest.mark.whole
def test_the_command_answers_a_file_and_what_is_typed(chat_model, tmp_path):
    """The second turn has the first and its answer before it."""
    out, template = tmp_path / "out.jsonl", load(chat_model)
    prompts = tmp_path / "talk.jsonl"
    prompts.write_text(json.dumps({"messages": TALK[:2]}) + "\n")
    run = generate(chat_model, f"--prompts={prompts}", f"--output={out}")
    assert run.returncode == 0, run.stderr
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["prompt_ids"] == template.encode(TALK[:2], True).ids.tolist()
    run = generate(chat_model, f"--output={out}", typed="Hello\nyou</s>\nAgain\n/exit\n")
    assert run.returncode == 0, run.stderr
    first, second = map(json.loads, out.read_text().splitlines())
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first["text"]}]
    assert first["prompt_ids"] == template.encode(talk[:1], True).ids.tolist()
    assert second["prompt_ids"] == template.encode([*talk, {"role": "user", "content": "Again"}], True).ids.tolist()
    assert run.stdout == first["text"] + "\n" + second["text"] + "\n"
    assert "spells the special token '</s>'" in run.stderr


def test_the_command_without_a_template(data):
    run = generate(data / "tiny" / "checkpoint", "--prompt=Hello")
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line]
    assert line.startswith("error: ") and "has no chat template" in line


@pytest.mark.parametrize("source", [TURNS, TOOLS])
def test_equal_to_transformers(folder, source):
    """The extra `parity`: text, tokens and the assistant's mask."""
    transformers = pytest.importorskip("transformers")
    template = load(with_config(folder, chat_template=source))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages, prompt, tools in ((TALK, False, SPECS), (TALK[:2], True, SPECS[:1])):
        options = {"tools": tools, "add_generation_prompt": prompt}
        text = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert template.render(messages, prompt, tools=tools) == text
        encoded = template.encode(messages, prompt, tools=tools)
        masked = {"return_dict": True, "return_assistant_tokens_mask": "generation" in source}
        expected = theirs.apply_chat_template(messages, **masked, **options)
        assert encoded.ids.tolist() == expected["input_ids"]
        if "generation" in source:
            assert encoded.assistant.astype(int).tolist() == expected["assistant_masks"]


def test_what_is_trained_from_a_chat_model_is_one(folder, tmp_path):
    """Saved with the folder that it came from, a tokenizer keeps its template and its roles."""
    tokenizer = load_tokenizer(with_config(folder, chat_template=TURNS, eos_token="<s>"))
    save_tokenizer(tokenizer, tmp_path / "run", source=folder)
    assert load(tmp_path / "run").render(TALK) == TALK_TEXT.replace("</s>", "<s>")
    (folder / "chat_template.jinja").write_text("x\n")
    save_tokenizer(tokenizer, tmp_path / "again", source=folder)
    assert load(tmp_path / "again").render(TALK) == "x"
    save_tokenizer(tokenizer, tmp_path / "plain")
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path / "plain")
