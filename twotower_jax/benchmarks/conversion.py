"""Conversion at real width: speed beside `cp` and SHA-256 of the same bytes, peak memory, and a bit-exact way back.

Makes a two-tower checkpoint of random bits with the release's widths and a few layers, and removes it afterwards.
"""

import contextlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

import jax
from absl import flags

from twotower_jax import command_line
from twotower_jax.benchmarks._synthetic import tensors_of
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.config import ModelConfig
from twotower_jax.parameters import parameter_table
from twotower_jax.two_tower import TwoTower

# Four times as fast as coreutils' sha256sum.
_HASH = """
import hashlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with path.open("rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest())
"""
_LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def define_flags() -> None:
    command_line.DEFINE_path(
        "directory", None, "Where to work; needs three times the checkpoint's size.", required=True
    )
    flags.DEFINE_string("layers", "ME*", "Layer pattern; ME* makes 8.4 GB.")
    flags.DEFINE_integer("rounds", 2, "How often to measure each.", lower_bound=1)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as scratch:
        folder = pathlib.Path(scratch)
        source, copy, converted, exported = (folder / name for name in ("source", "copy", "converted", "exported"))
        size = _make(source, flags.FLAGS.layers)
        print(f"{size / 1e9:.2f} GB, layers {flags.FLAGS.layers}, {os.cpu_count()} cores, Python "
              f"{platform.python_version()}, jax {jax.__version__}")  # fmt: skip
        bare = _run([sys.executable, "-c", "import time; time.sleep(0.2)"])[2]
        imports = _run([sys.executable, "-c", "import twotower_jax.checkpoint.convert, time; time.sleep(0.2)"])[2]
        print(f"peak memory of a bare interpreter {bare / 2**20:.0f} MiB, with the imports {imports / 2**20:.0f} MiB")
        baseline = {"cp": ["cp", "-r", source, copy], "SHA-256": [sys.executable, "-c", _HASH, copy]}
        ours = {
            "convert": _command("convert", f"--source={source}", f"--output={converted}"),
            "export": _command("export", f"--checkpoint={converted}", f"--output={exported}"),
        }
        for number in range(1, flags.FLAGS.rounds + 1):
            _evict(source)  # So that everyone reads it from the disk.
            base = [_measure(f"round {number}, {name}", step, size, bare) for name, step in baseline.items()]
            shutil.rmtree(copy)
            _evict(source)
            found = _measure(f"round {number}, convert", ours["convert"], size, bare)
            clock, processor = (sum(spent[i] for spent in base) / found[i] for i in range(2))
            print(f"round {number}: converting has {clock:.2f} of the speed of copying and hashing by the clock, "
                  f"{processor:.2f} by processor time", flush=True)  # fmt: skip
            _evict(converted)
            _measure(f"round {number}, export", ours["export"], size, bare)
            different = _differences(source, exported)
            print(f"round {number}, exported files against the source's: {different or 'the same bytes'}", flush=True)
            shutil.rmtree(converted)
            shutil.rmtree(exported)


def _make(source: pathlib.Path, layers: str) -> int:
    """A folder with the release's widths; returns its size."""
    config = ModelConfig(
        vocab_size=131072,
        hidden_size=2688,
        hybrid_override_pattern=layers,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        intermediate_size=3712,
    )
    raw = config.to_hf() | {"architectures": ["NemotronHTwoTowerForCausalLM"]}
    tensors = tensors_of(parameter_table(TwoTower(config)), seed=0)
    with contextlib.redirect_stderr(sys.stdout):
        write_folder(source, tensors, {"config.json": json.dumps(raw, indent=1).encode()}, 5 * 10**9)
    return sum(file.stat().st_size for file in source.iterdir())


def _command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(_LAUNCH / f"{name}.py"), *arguments]


def _measure(label: str, command: list, size: int, bare: int) -> tuple[float, float]:
    """Runs a command that handles `size` bytes, prints speed and memory; returns its seconds by clock and processor."""
    seconds, processor, peak = _run(command)
    print(f"{label}: {seconds:.1f} s, {size / 1e9 / seconds:.3f} GB/s, {processor:.1f} s of processor time, "
          f"peak memory {(peak - bare) / 2**20:.0f} MiB above a bare interpreter", flush=True)  # fmt: skip
    return seconds, processor


def _run(command: list) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of processor time, and peak resident bytes of a command.

    Raises:
      ValueError: if it fails.
    """
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while True:
            # Asked for while it runs: what the kernel tells afterwards (ru_maxrss) includes the parent's memory.
            peak = max(peak, _peak_bytes(process.pid))
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise ValueError(f"{command} failed with status {process.returncode}: {errors.read().decode()}")
    return seconds, usage.ru_utime + usage.ru_stime, peak


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _evict(folder: pathlib.Path) -> None:
    """Drops the files below a folder from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _differences(first: pathlib.Path, second: pathlib.Path) -> str:
    """What `diff` says of two folders."""
    return subprocess.run(["diff", "-rq", first, second], capture_output=True, text=True).stdout.strip()
