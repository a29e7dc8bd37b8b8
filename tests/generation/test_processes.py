"""An engine on a mesh over several processes gives what one process gives."""

import json
import os
import socket
import subprocess
import sys

import pytest
import several

from helpers import ROOT


@pytest.mark.whole
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_what_one_gives(count):
    """Rows of two modes, submitted at the start and later, one canceled, one in a message of two parts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "support" / "several.py"), f"127.0.0.1:{port}", str(count)]
    pipe, environment = subprocess.PIPE, os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=pipe, stderr=pipe, text=True) for i in range(count)
    ]
    try:
        expected = several.lead(several.engine())
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, [said[-2000:] for _, said in outputs]
    found = {int(number): told for number, told in json.loads(outputs[0][0].splitlines()[-1]).items()}
    assert found == expected
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
