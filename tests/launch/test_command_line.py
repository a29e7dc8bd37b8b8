"""What every command does alike, whatever the user's shell, environment and machine do to it."""

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from helpers import ROOT, run_command
from twotower_jax import command_line, jax_settings, randomness
from twotower_jax.checkpoint import huggingface, inspection, load
from twotower_jax.diffusion import MaskedDiffusion
from twotower_jax.files import CheckpointError
from twotower_jax.generation.slots import row_keys
from twotower_jax.train import stopping
from twotower_jax.train.config import freeze

COMMANDS = sorted(path.name for path in (ROOT / "launch").glob("*.py") if path.name != "environment.py")


def run(*arguments, python=(), **environment) -> tuple[int, str, str]:
    command = [sys.executable, *python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_only_some_commands_need_is_not_imported_for_all():
    """Each of these takes a quarter to half a second."""
    modules = "settings_from_flags, data, generation, checkpoint.load"
    lines = [f"import twotower_jax.{name}" for name in modules.split(", ")]
    heavy = {"grain", "orbax.checkpoint", "tensorboardX", "torch"}
    code = "; ".join(["import sys", *lines, f"print(*sorted({heavy} & sys.modules.keys()))"])
    assert run("-c", code) == (0, "\n", "")


def main(body: str, **environment) -> tuple[int, str, str]:
    """Runs a command whose main is this."""
    lines = "\n    ".join(body.splitlines())
    code = f"from twotower_jax import command_line\ndef main():\n    {lines}\ncommand_line.run(main)"
    return run("-c", code, **environment)


# Random numbers and settings.


def test_every_key_is_made_in_one_place():
    for file in [*(ROOT / "twotower_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        found = re.findall(r"^[^#\n]*\brandom\.(?:key|PRNGKey)\(", file.read_text(), re.MULTILINE)
        assert len(found) == (file.name == "randomness.py"), file


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_random_numbers_do_not_depend_on_the_default_generator(implementation):
    ids, index = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.arange(2, dtype=jnp.int32)

    def draw():
        noise = MaskedDiffusion().corrupt(ids, seed=3, step=5, example_index=index, mask_token_id=3)
        return jax.random.bits(randomness.key(7), (4,)), jax.random.key_data(row_keys(jnp.uint32(1), index)), noise

    expected = draw()
    with jax.default_prng_impl(implementation):
        assert str(jax.random.key_impl(jax.random.key(0))) != randomness.IMPLEMENTATION
        jax.tree.map(np.testing.assert_array_equal, draw(), expected)


def test_the_settings_of_this_environment_are_those_expected():
    jax_settings.check_settings()
    known = jax.config.values
    assert known.keys() >= jax_settings.EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(jax_settings.EXPECTED))
def test_settings_that_change_numbers_are_refused(monkeypatch, name):
    monkeypatch.setattr(jax_settings, "jax", types.SimpleNamespace(config=types.SimpleNamespace(values={name: "odd"})))
    with pytest.raises(ValueError, match=f"^{name.upper()}=odd changes"):
        jax_settings.check_settings()


@pytest.mark.whole
@pytest.mark.parametrize(
    "setting", ["JAX_ENABLE_X64=1", "JAX_NUMPY_DTYPE_PROMOTION=strict", "JAX_DEBUG_NANS=1", "JAX_DISABLE_JIT=1"]
)
def test_a_setting_is_read_from_the_environment(setting):
    name, value = setting.split("=")
    code, out, said = main("import jax\nprint('began')", **{name: value})
    assert (code, out) == (0, "began\n")  # What does not use JAX does not care.
    code, out, said = run(ROOT / "launch/inspect_checkpoint.py", "--checkpoint=x", **{name: value})
    assert (code, out) == (2, "") and said.startswith(f"error: {name}=") and said.count("\n") == 1


# Errors in one line.


def test_a_long_message_is_cut_to_a_line_that_can_be_read(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.fail("begins\nhere " + "name, " * 10_000 + "ends here", 2)
    said = capsys.readouterr().err
    assert said.startswith("error: begins here name,") and said.endswith("ends here\n")
    assert said.count("\n") == 1 and len(said) < 2100


# A shell starts what it runs in the background with SIGINT ignored: Ctrl-C is not for that.
_INTERRUPTED = """import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)"""

_ENDED = "import os, signal, time\nos.kill(os.getpid(), signal.{0})\ntime.sleep(9)"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise ValueError('so\\nso')", 2, "error: so so\n"),
        ("raise OSError(38, 'Function not implemented', 'x')", 2, "error: x: Function not implemented\n"),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\\nmore')",
            2,
            "error: Out of memory allocating 99 bytes. More devices would hold it, or fewer rows at a time",
        ),
        ("raise KeyboardInterrupt", 130, "error: interrupted; nothing was left half-written\n"),
        ("raise BrokenPipeError(32, 'Broken pipe')", 141, ""),
        (f"{_INTERRUPTED}\ntime.sleep(9)", 130, "error: interrupted; nothing was left half-written\n"),
        (_ENDED.format("SIGTERM"), 130, "error: interrupted; nothing was left half-written\n"),
        pytest.param(
            _ENDED.format("SIGHUP"),
            130,
            "error: interrupted; nothing was left half-written\n",
            marks=pytest.mark.skipif(
                signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup has it ignored, and so do commands"
            ),
        ),
    ],
)
def test_how_a_command_ends(body, status, said):
    code, out, err = main(body)
    assert (code, out) == (status, "") and (err == said or err.startswith(said)) and err.count("\n") <= 1


def test_an_interruption_is_not_lost_in_a_callback():
    """A callback of the garbage collector, where Python prints an exception and goes on."""
    body = f"""import gc, time
def callback(phase, info):
    if phase == 'stop':
        gc.callbacks.remove(callback)
        {_INTERRUPTED.replace(chr(10), chr(10) + "        ")}
gc.callbacks.append(callback)
gc.collect()
time.sleep(2)"""
    assert main(body) == (130, "", "error: interrupted; nothing was left half-written\n")


def test_a_second_interruption_does_not_disturb_the_cleaning_up_after_the_first():
    begun = _ENDED.format("SIGTERM").replace("\n", "\n    ")
    cleaned = "os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n    print('cleaned up')"
    code, out, err = main(f"try:\n    {begun}\nfinally:\n    {cleaned}")
    assert (code, out, err) == (130, "cleaned up\n", "error: interrupted; nothing was left half-written\n")


@pytest.mark.parametrize("body", ["import signal\nprint(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"])
def test_under_nohup_a_command_goes_on_when_the_terminal_goes(body):
    code = f"from twotower_jax import command_line\ndef main():\n    {body.replace(chr(10), chr(10) + '    ')}\n"
    ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert run("-c", f"{ignored}{code}command_line.run(main)") == (0, "True\n", "")


def test_an_error_may_have_a_status_of_its_own():
    lines = "raise FloatingPointError('the loss is nan')"
    options = "statuses={FloatingPointError: command_line.DIVERGED, RuntimeError: command_line.NOT_SAVED}"
    for body, status in (lines, 5), (lines.replace("FloatingPoint", "Runtime"), 6):
        code = f"from twotower_jax import command_line\ndef main():\n    {body}\ncommand_line.run(main, {options})"
        assert run("-c", code) == (status, "", "error: the loss is nan\n")


def test_generated_rows_are_checked_before_a_model_is_loaded(tmp_path):
    rows = tmp_path / "rows.jsonl"
    for prompt, tokens in ("[]", "[3]"), ("[5]", "7"), ("[5]", "[[7]]"), ("[true]", "[7]"):
        bad = f'{{"prompt_ids": {prompt}, "tokens": {tokens}}}'
        rows.write_text(f'{{"prompt_ids": [5], "tokens": []}}\n{bad}\n')
        words = ["--checkpoint=nowhere", f"--input={rows}", f"--output={tmp_path / 'out'}", "--objective=generations"]
        done = run_command("score", *words, "--eos=2")
        code, out, err = done.returncode, done.stdout, done.stderr
        assert (code, out) == (2, "") and err.startswith(f"error: {rows}, row 2: prompt_ids and tokens must be lists")
        assert err.count("\n") == 1 and list(tmp_path.iterdir()) == [rows]


def test_a_bug_keeps_its_traceback():
    code, _, err = main("raise TypeError('wrong')")
    assert code == 1 and "Traceback" in err and "TypeError: wrong" in err


@pytest.mark.parametrize("body", ["print('x\\n' * 100_000)", "print('x')", "command_line.show('x' * 100_000, 0)"])
def test_who_closes_the_pipe_is_not_complained_to(body):
    code = f"from twotower_jax import command_line\ndef main():\n    {body}\ncommand_line.run(main)"
    command = f'set -o pipefail; {sys.executable} -c "$CODE" | true'
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", command], env=os.environ | {"CODE": code}, capture_output=True, text=True, check=False
        )
        assert (done.returncode in (0, 141), done.stderr) == (True, "")


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x' * 100_000)"])
def test_output_that_cannot_be_written_is_an_error(body):
    """As on a full disk, where a shell keeps it."""
    code = f"from twotower_jax import command_line\ndef main():\n    {body}\ncommand_line.run(main)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


def test_output_that_the_terminal_cannot_show_is_spelled():
    code, out, err = main("print('naïve 🙂')", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (code, out, err) == (0, "na\\xefve \\U0001f642\n", "")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_here_is_named(platform):
    body = "import jax\nprint(jax.numpy.ones(3))"
    code, out, err = main(body, JAX_PLATFORMS=platform)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: JAX finds nothing to compute on with JAX_PLATFORMS={platform}: "), err


# Flags.


def test_flags_that_nothing_looks_at_are_named():
    values = flags.FlagValues()
    used, other = (flags.DEFINE_integer(name, 3, "", flag_values=values) for name in ("used", "other"))
    values(["command", "--used=3"])
    command_line.refuse_given([other], "here")
    with pytest.raises(ValueError, match="--used changes nothing with --verify; leave it out"):
        command_line.refuse_given([other, used], "with --verify")


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_a_checkpoint_that_is_not_there_is_no_broken_one(tmp_path, kind):
    """Status 2 in every command, and not 3."""
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    said = {"nothing": "no such folder", "file": "is a file, not a folder"}[kind]
    for read in (load.load, load.contents, inspection.describe, huggingface.open_folder):
        with pytest.raises(ValueError, match=f"{path}: {said}; give a Hugging Face folder") as error:
            read(path)
        assert not isinstance(error.value, CheckpointError)


def test_every_flag_that_is_a_path_understands_home_and_file_addresses():
    names = "checkpoint|output|prompts|trace|workdir|source|input|tokenizer|verify|expected|json|table|sha256|directory"
    for file in [*(ROOT / "launch").glob("*.py"), *(ROOT / "twotower_jax").rglob("*.py")]:
        assert not re.findall(rf'DEFINE_string\(\s*"({names})"', file.read_text()), file


@pytest.mark.parametrize("given", ["~/nowhere", "file:///somewhere/nowhere"])
def test_paths_are_expanded_by_the_parser(given):
    done = run_command("inspect_checkpoint", f"--checkpoint={given}", HOME="/somewhere")
    code, err = done.returncode, done.stderr
    assert code in (2, 3) and "/somewhere/nowhere" in err and err.count("\n") == 1 and "~" not in err


@pytest.fixture
def config_words(monkeypatch, tmp_path):
    """Parses the words of a command whose --config is a file of this content; returns what went wrong."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.py"

    def parse(content: str, *words: str, capsys) -> str:
        file.write_text(content)
        # Where another test has loaded a file of this name, its module would be filled once more.
        sys.modules.pop("config_config", None)
        monkeypatch.setattr(command_line.flags, "FLAGS", flags.FlagValues())
        flags.DEFINE_integer("verbosity", 0, "As absl's own.", flag_values=command_line.flags.FLAGS)
        config_flags.DEFINE_config_file("config", flag_values=command_line.flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit, match="2"):
            command_line._parse(sys.argv)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said.removeprefix("error: ").rstrip("\n").replace(str(tmp_path), "HOME")

    return parse


@pytest.mark.filterwarnings("ignore:the load_module")
def test_what_is_wrong_with_a_config_file_is_said_with_its_path(config_words, capsys):
    for words in (["--config=~/nowhere.py"], ["--config", "~/nowhere.py:h200"], ["--config="]):
        given = words[-1].removeprefix("--config=")
        expected = f"--config={given}: there is no such file; give one of configs/ or your own"
        assert config_words("", *words, capsys=capsys) == expected
    for content, message in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError: invalid syntax (config.py, line 1)"),
        ("x = 1", "AttributeError: module 'config_config' has no attribute 'get_config'"),
        ("def get_config():\n    return {}['x']", "KeyError: x"),
    ):
        said = config_words(content, "--config=~/config.py", capsys=capsys)
        assert said == f"--config=HOME/config.py: {message}"


def test_paths_of_a_config_are_expanded(train_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    from twotower_jax.train.config import base_config

    config = base_config({"hidden_size": 16, "hybrid_override_pattern": "-", "intermediate_size": 8}
                         | {"mamba_num_heads": 1, "mamba_head_dim": 1, "ssm_state_size": 1, "n_groups": 1})  # fmt: skip
    config.init_from, config.data = "~/start", "file:///data/a%20b"
    frozen = freeze(config)
    assert (frozen.init_from, frozen.data) == ("/home/me/start", "/data/a b")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--checkpont=x"], "Unknown command line flag 'checkpont'. Did you mean: checkpoint ?"),
        (["--checkpoint=x", "more"], "unexpected argument 'more'"),
        (["--checkpoint=~nobody-of-this-name/x"], "there is no such home folder"),
        (["--checkpoint="], "--checkpoint=: is empty; give a path"),
        (["--checkpoint=x", "--arrays=perhaps"], "error: flag --arrays=perhaps: is neither true nor false"),
    ],
)
def test_a_typo_is_said_in_one_line(flags, said):
    done = run_command("inspect_checkpoint", *flags)
    code, err = done.returncode, done.stderr
    assert code == 2 and said in err and err.count("\n") == 1 and "\\n" not in err


# What may be missing, and interruptions.


def interruptible(*arguments: str) -> list[str]:
    """The command `python ARGUMENTS`, which SIGINT reaches even if these tests run in the background of a shell."""
    heard = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    code = f"import os, signal, sys; {heard}; os.execv(sys.executable, sys.argv[1:])"
    return [sys.executable, "-c", code, sys.executable, *arguments]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_to_install_it(name, tmp_path):
    code, out, err = run(ROOT / "launch" / name, "--help", python=["-S", "-E"], PYTHONPATH="")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: the package 'absl' is not installed") and "pip install -e" in err


def test_a_setting_that_jax_cannot_read_is_named():
    code, _, err = run(ROOT / "launch/convert.py", "--source=x", "--output=y", JAX_ENABLE_X64="perhaps")
    assert code == 2 and err.count("\n") == 1 and "cannot read a setting of the environment" in err


def test_an_interruption_while_importing_is_a_line():
    command = interruptible("-X", "importtime", str(ROOT / "launch/generate.py"), "--checkpoint=x", "--prompt=x")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        # JAX is being imported when this module of its own has been.
        next(line for line in process.stderr if "jax._src.config" in line)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in err and "error: interrupted" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_every_interruption_before_the_command_listens_is_a_line(name):
    body = f"import signal\nsignal.signal(signal.{name}, signal.SIG_DFL)\nimport environment, os, time\n"
    environment = {"PYTHONPATH": str(ROOT / "launch")}
    code, out, err = run("-c", f"{body}os.kill(os.getpid(), signal.{name})\ntime.sleep(9)", **environment)
    assert (code, out, err) == (130, "", "error: interrupted; nothing had begun\n")


def test_a_worker_leaves_speaking_to_its_parent(tmp_path):
    """It imports the command anew, and what ends all processes of a group ends it without a word."""
    (tmp_path / "command.py").write_text(
        "import environment, multiprocessing, os, signal\n"
        "def work():\n    print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    worker.start()\n    worker.join()\n    print(worker.exitcode)\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "launch")}
    assert run(tmp_path / "command.py", **environment) == (0, f"True\n{-signal.SIGTERM}\n", "")


def test_an_interrupted_generation_leaves_nothing(small_folder, tmp_path):
    (tmp_path / "prompts").write_text('{"ids": [5, 6, 7]}\n')
    flags = [f"--checkpoint={small_folder}", "--prompts=prompts", "--output=out", "--max_new_tokens=100000"]
    command = interruptible(str(ROOT / "launch/generate.py"), *flags, "--mode=ar", "--ignore_eos")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / ".out.partial").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and err.splitlines()[-1].startswith("error: interrupted"), err
    assert "Traceback" not in err and os.listdir(tmp_path) == ["prompts"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_what_schedulers_send_is_a_wish_to_stop(monkeypatch, number):
    monkeypatch.setattr(stopping, "_received", "")
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    signal.signal(number, signal.SIG_DFL)  # whatever these tests were started by
    try:
        stopping.listen()
        assert stopping.requested() == ""
        os.kill(os.getpid(), number)
        assert stopping.requested() == number.name
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_run_under_nohup_goes_on_when_the_terminal_goes(monkeypatch):
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopping.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# The page that explains messages.


def literals(folder: pathlib.Path) -> list[str]:
    """What the strings of a folder's programs say, a mark where a value comes in."""
    found = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                found.append(node.value if isinstance(node.value, str) else node.value.decode("latin-1"))
    return found


def test_every_message_that_is_explained_is_one_that_is_printed():
    said = [text for name in ("twotower_jax", "launch") for text in literals(ROOT / name)]
    said += literals(pathlib.Path(flags.__file__).parent)
    page = (ROOT / "docs/guide/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    unsaid = []
    for message in messages:
        # What lies between the parts that differ from case to case, of which some are examples here.
        parts = re.split(r"…|\b[A-Z]+(?:_[A-Z]+)*\b(?!-)|'\[?'|'absl'|0xff|--\w+(?:=\w+)?|flock|fsync|[()']", message)
        parts = [part.strip(" :.,;") for part in parts]
        assert any(len(part) > 7 for part in parts), message
        for part in parts:
            if len(part) > 4 and not any(part in text for text in said):
                unsaid.append((message, part))
    assert not unsaid
