"""Conversations: from rows to tokens, in windows, prepared on disk, mixed with text, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import run_command
from twotower_jax.data import TrainingData, encode, load_tokenizer
from twotower_jax.data.conversation_windows import ConversationWindows
from twotower_jax.data.conversations import Coder, ConversationList, Encoding, Turns, conversation_text
from twotower_jax.data.formats import slices
from twotower_jax.data.inputs import find_files, read_rows
from twotower_jax.data.opening import Data, Packing
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import PreparedConversations, verify

END, WEIGHT = 2, 0.25
TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<assistant>' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}

    {%- else %}
        {{- '<' + message.role + '>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def talk(*contents, system=None):
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *said] if system else said}


TALKS = [
    *(talk(f"What is {i} and {i}?", f"It is {2 * i}.", "Sure?", "Yes.", system="Be brief.") for i in range(20)),
    *({"prompt": f"Count from {i}", "response": f"{i}, {i + 1}, {i + 2}"} for i in range(20)),
]


@pytest.fixture
def folder(tmp_path, data):
    """A tokenizer of 512 tokens with a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(data / "tiny" / "checkpoint" / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packing(folder, length=64, align=8, fraction=0.0, **changes):
    return Packing(length, 512, fraction, 0, 8, (END,), align, WEIGHT, folder)._replace(**changes)


# Windows.


def literal_windows(conversations, length, align):
    """What `ConversationWindows` should give, one token at a time: (id, start, weight, turn) of each position."""
    laid = []
    for ids, parts in conversations:
        line, ids = [], ids.tolist()
        for number, (before, answer) in enumerate(parts.tolist(), 1):
            line += [(END, None, 0.0, 0)] * (-before % align)
            line += [(ids.pop(0), number, 0.0, 0) for _ in range(before)]
            line += [(ids.pop(0), number, 1.0, number) for _ in range(answer)]
            line += [(END, number, WEIGHT, number)] * (-answer % align)
        if any(weight for _, _, weight, _ in line[:length]):
            laid.append(line[:length])
    windows, start = [[]], 0
    for line in laid:
        if len(windows[-1]) + len(line) > length:
            windows.append([])
            start = 0
        began = False
        for token, said, weight, turn in line:
            if said is not None and not began:
                began, start = True, len(windows[-1])
            windows[-1].append((token, start, weight, turn))
    for window in windows:
        window += [(END, window[-1][1], 0.0, 0)] * (length - len(window))
    return windows


turns = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=4)


@given(st.lists(turns, min_size=1, max_size=8), st.sampled_from([1, 2, 8]), st.integers(2, 8))
def test_windows_equal_literal_ones(talks, align, blocks):
    rng, length = np.random.default_rng(0), 8 * blocks
    conversations = [Turns(rng.integers(4, 99, np.sum(t)).astype(np.int32), np.array(t, np.int64)) for t in talks]
    options = {"name": "talks", "align": align, "padding_weight": WEIGHT, "end_token": END}
    left_out = sum(-(-t[0][0] // align) * align >= length for t in talks)
    if left_out == len(talks):
        with pytest.raises(ValueError, match="no answer begins within"):
            ConversationWindows(ConversationList(conversations), length, 99, **options)
        return
    windows = ConversationWindows(ConversationList(conversations), length, 99, **options)
    expected = literal_windows(conversations, length, align)
    assert (len(windows), windows.tokens, windows.left_out) == (len(expected), len(expected) * length, left_out)
    for index, window in enumerate(expected):
        found = windows[index]
        names = ("ids", "document_start", "token_weight", "turn")
        for name, values in zip(names, zip(*window, strict=True), strict=True):
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert np.array_equal(found["counted"], found["token_weight"] > 0)
        # An answer and what counts with it fill blocks of their own.
        in_blocks = found["turn"].reshape(-1, align)
        assert (in_blocks == in_blocks[:, :1]).all()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_what_is_cut_and_left_out_is_counted(folder, tmp_path):
    rows = [talk("a", "b"), talk("a", "b " * 90), talk("a " * 90, "b"), talk("a", "b", "c " * 90, "d")]
    said = []
    Data(str(write(tmp_path / "talks.jsonl", rows)), said.append).windows(load_tokenizer(folder), packing(folder))
    assert said[-1].endswith(
        "3 conversations, 3 answers of 52 tokens, in 3 windows; 2 cut at sequence_length; "
        "1 left out, whose first answer begins after it"
    )


# Tokens.


def spoken(turns, tokenizer):
    """What is said, part after part."""
    ends = np.cumsum(turns.parts.ravel())
    assert ends[-1] == len(turns.ids) and turns.ids.dtype == np.int32
    return [tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in np.split(turns.ids, ends[:-1])]


@pytest.mark.parametrize(
    ("marked", "answer", "next_begins"),
    [
        ("{% generation %}{{ message.content + eos_token }}{% endgeneration %}", "Yes.</s>", "<user>"),
        # What follows an end token is never generated, marked or not.
        ("{% generation %}{{ message.content + eos_token + '\\n' }}{% endgeneration %}", "Yes.</s>", "\n<user>"),
        # An end token right after what is marked is the assistant's, and where there is none, one is added.
        ("{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}", "Yes.</s>", "<user>"),
        ("{% generation %}{{ message.content }}{% endgeneration %}{{ '|' }}", "Yes.</s>", "|<user>"),
    ],
)
def test_an_answer_ends_with_its_end_token(folder, marked, answer, next_begins):
    source = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<assistant>' }}" + marked + "{% else %}"
        "{{ '<' + message.role + '>' + message.content }}{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    tokenizer = load_tokenizer(folder)
    text = conversation_text(talk("2?", "Yes.", "Sure?", "Yes.", "Thanks."))
    expected = ["<user>2?<assistant>", answer, next_begins + "Sure?<assistant>", answer]
    assert spoken(Coder(tokenizer, folder, [END])(text), tokenizer) == expected


def test_a_prompt_and_a_response(folder):
    """They are two messages, or joined as they are where there is no template."""
    tokenizer, row = load_tokenizer(folder), {"prompt": "2 < 3?", "response": "Yes, </s>.", "id": 7}
    with_template = Coder(tokenizer, folder, [END])
    assert not with_template.joins
    as_messages = with_template(conversation_text(talk("2 < 3?", "Yes.")))
    assert np.array_equal(with_template(conversation_text(row | {"response": "Yes."})).ids, as_messages.ids)
    (folder / "chat_template.jinja").unlink()
    without = Coder(tokenizer, folder, [END, 7])
    assert without.joins
    ids, parts = without(conversation_text(row))
    prompt, response = encode(tokenizer, [row["prompt"], row["response"]])
    assert ids.tolist() == [*prompt, *response, END] and parts.tolist() == [[len(prompt), len(response) + 1]]
    with pytest.raises(ValueError, match=r'"messages" need a chat template \(chat_template.jinja\), and the'):
        without(conversation_text(talk("a", "b")))


# What is refused.

BAD = [
    ({"messages": []}, "a list of at least one"),
    ({"messages": "hello"}, "a list of at least one"),
    ({"messages": [{"content": "a"}]}, 'message 1 must be an object with a "role"'),
    (talk("a"), 'no message has the role "assistant", so there is nothing to learn'),
    ({"messages": [{"role": "bot", "content": "a"}]}, "message 1 has the unknown role 'bot'; known are system, "),
    ({"messages": [{"role": "user", "content": 3}]}, r'message 1 \(user\): "content" must be a string'),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, r"message 2 \(assistant\): \"content\""),
    (talk("</s>", "b"), r"message 1 \(user\) spells the special token '</s>'"),
    ({"prompt": "a"}, '"response" must be a string that holds text'),
    ({"prompt": "a", "response": " "}, '"response" must be a string that holds text'),
    ({"prompt": ["a"], "response": "b"}, '"prompt" must be a string that holds text'),
    ({"text": "a text among conversations"}, "every row must be a conversation"),
    (["a"], "every row must be a conversation"),
]


@pytest.mark.parametrize(("row", "said"), BAD, ids=[json.dumps(row)[:40] for row, _ in BAD])
def test_a_bad_row_is_named(folder, tmp_path, row, said):
    path = write(tmp_path / "talks.jsonl", [TALKS[0], row])
    with pytest.raises(ValueError, match=f"talks.jsonl, line 2: .*{said}"):
        Data(str(path)).windows(load_tokenizer(folder), packing(folder))


def test_texts_go_on_as_they_do(folder, tmp_path):
    """A row with a text is a text whatever else it has; other kinds of files are no conversations."""
    path = write(tmp_path / "texts.jsonl", [{"text": "alpha beta " * 40, "messages": [], "prompt": "a"}] * 2)
    data = Data(str(path))
    assert not data.conversational
    assert set(data.windows(load_tokenizer(folder), packing(folder)._replace(align=None))[0][0]) == {"ids"}
    (tmp_path / "talks").mkdir()
    write(tmp_path / "talks" / "a.jsonl", TALKS)
    (tmp_path / "talks" / "b.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"b.txt: conversations are rows of JSON; keep other files apart"):
        Data(str(tmp_path / "talks")).windows(load_tokenizer(folder), packing(folder))


def test_a_template_that_does_not_say_what_the_assistant_says(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = write(tmp_path / "talks.jsonl", TALKS)
    with pytest.raises(ValueError, match=r"does not say what the assistant says; put \{% generation %\}"):
        Data(str(path)).windows(load_tokenizer(folder), packing(folder))
    flags = f"--input={path}", f"--output={tmp_path / 'out'}", f"--tokenizer={folder}"
    done = run_command("prepare", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "{% generation %}" in done.stderr
    assert not (tmp_path / "out").exists()


# On disk, and mixed.


def coded(folder, path):
    encoding = Encoding(Coder(load_tokenizer(folder), folder, [END]))
    for piece in slices(find_files([str(path)])[0], 2**20):
        assert not [row.problem for row in read_rows(piece, encoding) if row.problem]
    return list(encoding.turns.values())


def test_prepared_conversations_are_those_of_the_files(folder, tmp_path):
    """In the order of the rows, in several shards, some held out; windows of them as of conversations in memory."""
    path, tokenizer = write(tmp_path / "talks.jsonl", TALKS), load_tokenizer(folder)
    flags = f"--input={path}", f"--tokenizer={folder}", "--validation_fraction=0.2", "--shard_size=150"
    done = run_command("prepare", *flags, f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    manifest = verify(tmp_path / "out")
    assert manifest.conversational and manifest.settings["end_tokens"] == [2] and len(manifest.shards) > 3
    (train, validation) = (PreparedConversations(tmp_path / "out", split) for split in ("train", "validation"))
    assert train.count + validation.count == len(TALKS) and validation.count > 2
    held_out = {validation[i].ids.tobytes() for i in range(validation.count)}
    expected = [turns for turns in coded(folder, path) if turns.ids.tobytes() not in held_out]
    for number, turns in enumerate(expected):
        found = train[number]
        assert np.array_equal(found.ids, turns.ids) and np.array_equal(found.parts, turns.parts)
    given = packing(folder, fraction=0.1)
    from_disk, own = Data(str(tmp_path / "out")).windows(tokenizer, given)
    options = {"name": "talks", "align": 8, "padding_weight": WEIGHT, "end_token": END}
    in_memory = ConversationWindows(ConversationList(expected), 64, 512, **options)
    assert len(from_disk) == len(in_memory) and len(own) > 0
    for index in range(len(in_memory)):
        for name, values in in_memory[index].items():
            np.testing.assert_array_equal(from_disk[index][name], values)
    # Another template makes other data.
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "<bot>"))
    options = {"validation_fraction": 0.2, "shard_size": 150}
    with pytest.raises(ValueError, match="template_sha256"):
        prepare([str(path)], tmp_path / "out", tokenizer, Settings(**options), quiet=True, tokenizer_folder=folder)


def test_preparing_names_the_bad_row_or_leaves_it_out(folder, tmp_path):
    path = write(tmp_path / "talks.jsonl", [TALKS[0], talk("a"), TALKS[1]])
    flags = f"--input={path}", f"--tokenizer={folder}", f"--output={tmp_path / 'out'}"
    done = run_command("prepare", *flags)
    assert done.returncode == 3 and 'line 2: no message has the role "assistant"' in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "dataset.json").exists()
    shutil.rmtree(tmp_path / "out")
    done = run_command("prepare", *flags, "--skip_bad")
    assert done.returncode == 0 and "skipped 1 broken rows" in done.stderr and "2 documents" in done.stdout


def test_conversations_mixed_with_text(folder, tmp_path):
    """All windows then say what each token counts; a text's tokens count 1."""
    write(tmp_path / "talks.jsonl", TALKS)
    write(tmp_path / "texts.jsonl", [{"text": f"{i} " * 90} for i in range(9)])
    paths = {name: {"path": f"{name}.jsonl", "weight": 0.5} for name in ("talks", "texts")}
    (tmp_path / "mixture.json").write_text(json.dumps(paths))
    data = Data(str(tmp_path / "mixture.json"))
    mixed, held_out = data.windows(load_tokenizer(folder), packing(folder, fraction=0.1))
    batch = next(TrainingData(mixed, batch_size=8, seed=0))
    assert data.conversational and set(batch) == {"ids", "document_start", "counted", "token_weight", "turn"}
    texts = batch["turn"].max(axis=1) == 0
    assert texts.sum() == 4
    np.testing.assert_array_equal(batch["token_weight"][texts], batch["counted"][texts])
    assert {name for i in range(len(held_out)) for name in held_out[i]} == set(batch)


def test_first_turns(folder, tmp_path):
    path, tokenizer = write(tmp_path / "talks.jsonl", [talk("a " * 90, "b"), TALKS[0]]), load_tokenizer(folder)
    windows, _ = Data(str(path)).windows(tokenizer, packing(folder))
    ((prompt, answer),) = windows.first_turns(5)
    assert tokenizer.decode(prompt.tolist()) == "<system>Be brief.<user>What is 0 and 0?<assistant>"
    assert tokenizer.decode(answer.tolist(), skip_special_tokens=False) == "It is 0.</s>"
