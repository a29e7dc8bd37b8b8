"""The measurement of the server, a small slice of it."""

import re

import pytest
from served import SHAPE

from helpers import run_command
from twotower_jax.benchmarks.serving import broken_bodies


@pytest.mark.whole
def test_a_small_server_bears_what_it_is_measured_with(checkpoint):
    sizes = {"mixed": 12, "malformed": 60, "disconnects": 6, "slow": 0, "memory": 0, "requests": 1, "new_tokens": 8}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    done = run_command("benchmark", "serving", f"--checkpoint={checkpoint}", *flags, "--clients=2", *SHAPE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"mixed +12 requests at once, \d+ tokens in [\d.]+ s; none lost, each as it is alone", lines[2])
    assert re.fullmatch(r"malformed +60 bodies: .*\d+ × 400.*", lines[3])
    assert re.fullmatch(r"disconnects +6 clients left; no row was left [\d.]+ s later", lines[4])
    assert re.fullmatch(r"\| 2 \|( \d+(\.\d+)? \|){6} -?\d+ \|", lines[-1])


def test_broken_bodies_are_the_same_each_time():
    bodies = list(broken_bodies(300, 0))
    assert bodies == list(broken_bodies(300, 0)) != list(broken_bodies(300, 1))
    assert len({path for path, _ in bodies}) == 4
