"""The documents: what they link to, and the files that they name, are there."""

import pathlib
import re

import pytest

from helpers import ROOT, run_command
from twotower_jax.train.config import base_config

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^(?:```.*?^```|    [^\n]*$)", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: pathlib.Path, text: str) -> list[str]:
    """The relative targets of links and images in a page's text that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def missing_files(text: str) -> list[str]:
    """Files of the repository that a text names by their paths, and that are not there."""
    folders = "docs|configs|launch|kernels|tests|twotower_jax"
    named = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.(?:md|py|json|gif|svg)\b(?!\.gz)", text)
    return [name for name in named if not (ROOT / name).is_file()]


def undated_tables(text: str) -> list[str]:
    """The sections with a table of times or rates that do not say when they were measured, nor does the page's head,
    nor that a test compares them with the code."""
    timed = re.compile(r"^\|.*(?<![\w.])(?:tokens/s|MB/s|GB/s|TFLOP/s|seconds|ms|µs|\d s)(?![\w/]).*\|$", re.MULTILINE)
    number = re.compile(r"^\|.*\| *[\d.,]+ *\|", re.MULTILINE)
    vouched = re.compile(r"\b20\d\d-\d\d-\d\d\b|A test compares")
    head, *sections = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
    if vouched.search(head):
        return []
    measured = [section for section in sections if timed.search(section) and number.search(section)]
    return [section.partition("\n")[0] for section in measured if not vouched.search(section)]


def test_what_was_measured_says_when():
    found = {page.name: undated_tables(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: sections for name, sections in found.items() if sections} == {}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_page_names_only_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert [name for name in missing_files(text) if "NAME" not in name] == []


def test_code_names_only_documents_that_are_there():
    sources = [
        file for folder in ("twotower_jax", "kernels", "launch", "configs") for file in (ROOT / folder).rglob("*.py")
    ]
    found = {str(file): re.findall(r"docs/[\w/]+\.md", file.read_text(encoding="utf-8")) for file in sources}
    assert [(file, name) for file, names in found.items() for name in names if not (ROOT / name).is_file()] == []
    assert sum(map(len, found.values())) > 5


def test_every_document_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\((docs/[^)#]+\.md)\)", text)}
    assert set(PAGES[2:]) - linked == set()


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / "page.md"
    text = (
        "# One two\n\n[a](#one-two) [b](#three) [c](gone.md) [d](https://x.y/z)\n\n    [e](code.md)\n\n![f](no.svg)\n"
    )
    page.write_text(text)
    assert broken_links(page, text) == ["#three", "gone.md", "no.svg"]
    table = "| what | ms |\n|---|--:|\n| a | 3 |\n"
    assert undated_tables(f"# A\n\n## B\n\n{table}\n## C\n\n{table}\n2026-11-29\n\n## D\n\n| a | b |\n") == ["## B"]
    assert undated_tables(f"# A\n\n2026-11-29\n\n## B\n\n{table}") == []
    assert missing_files("see `docs/gone.md` and launch/train.py, ours/docs/gone.md") == ["docs/gone.md"]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands that a page names, each with its flags."""
    found = re.findall(r"python launch/(\w+)\.py((?:\\\n|[^\n`#])*)", text)
    flag = re.compile(r"(?<![\w-])--(?:no)?([a-z][\w.]*)(?=[=\s\\]|$)")
    return [(name, flag.findall(rest)) for name, rest in found]


COMMANDS = [
    (page.name, *command)
    for page in PAGES
    if page.parent.name != "reports"  # whose commands are those of their day
    for command in commands(page.read_text(encoding="utf-8"))
]


# The flags of a measurement are its own, and it is imported for them.
@pytest.mark.parametrize("name", sorted({name for _, name, _ in COMMANDS} - {"benchmark", "NAME"}))
def test_commands_of_the_pages_have_their_flags(tmp_path, name):
    told = run_command(name, "--helpfull", cwd=tmp_path).stdout
    known = set(re.findall(r"--(?:\[no\])?(\w+)(?::|\n|,)", told))
    fields = base_config({}).to_dict()

    def is_there(flag):
        first, *rest = flag.split(".")
        if first != "config" or not rest:
            return flag in known
        return rest[0] in fields or rest[0].isupper()  # FIELD stands for any.

    assert len(known) > 5
    said = {(page, flag) for page, of, flags in COMMANDS if of == name for flag in flags}
    assert {(page, flag) for page, flag in said if not is_there(flag)} == set()


def test_flags_of_a_command_are_found():
    text = "    python launch/train.py --config=x.py \\\n        --config.seed=3 --noverify  # --not\n"
    text += "`python launch/a.py --b`"
    assert commands(text) == [("train", ["config", "config.seed", "verify"]), ("a", ["b"])]
