"""The command as it is started: its page in a browser, what it says, and how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import browser
import pytest
from served import SHAPE

from helpers import ROOT, run_command


def ask(url: str, body: dict | None = None) -> bytes:
    headers = {"content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return answer.read()


def until_ready(url: str) -> None:
    while True:
        try:
            assert json.loads(ask(f"{url}/ready")) == {"status": "ready"}
            return
        except urllib.error.HTTPError as error:
            assert error.code == 503 and json.loads(error.read()) == {"status": "starting"}


def ask_in_vain(url: str, body: dict) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(url, body)


@pytest.fixture(scope="module")
def process(checkpoint):
    """The running command and its address. The last test ends it."""
    flags = ["--port=0", *SHAPE, "--max_new_tokens=12", "--warmup"]
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"--checkpoint={checkpoint}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving small on (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line + process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()


def test_it_says_when_it_is_ready(process):
    _, url = process
    assert json.loads(ask(f"{url}/health")) == {"status": "ok"}
    until_ready(url)


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium here")
def test_the_page_shows_blocks_resolving(process):
    _, url = process
    expected = json.loads(ask(f"{url}/v1/completions", {"prompt": "The list", "ignore_eos": True}))["choices"][0][
        "text"
    ]
    with browser.Page(url) as page:
        assert page.run("document.getElementById('model').textContent") == "small"
        assert page.run("document.getElementById('block_size').value") == "4"
        page.run(
            "document.getElementById('prompt').value = 'The list';"
            "document.getElementById('ignore_eos').checked = true;"
            "document.getElementById('pace').value = '15';"
            "window.seen = []; new MutationObserver(() => seen.push([...document.querySelectorAll('#written .block')]"
            ".map((b) => [b.querySelectorAll('.mask').length, b.querySelectorAll('.token').length])))"
            ".observe(document.getElementById('written'), {childList: true, subtree: true});"
        )
        page.click("#run")
        page.until("document.body.dataset.state")
        assert page.run("document.body.dataset.state") == "done", page.run(
            "document.getElementById('status').textContent"
        )
        assert page.run("document.getElementById('written').textContent") == expected
        assert page.run("document.getElementById('prompted').textContent") == "The list"
        assert page.run("document.getElementById('status').textContent").startswith("12 tokens, ")
        seen = page.run("seen")
        # Fields of the newest block fill, one block after another.
        last = [blocks[-1] for blocks in seen if blocks and sum(blocks[-1]) == 4]
        assert any(masks and tokens for masks, tokens in last)
        assert all(masks == 0 for blocks in seen for masks, _ in blocks[:-1])
        assert len(seen[-1]) == 3
        # Every step can be seen again; the last is what was written.
        assert not page.run("document.getElementById('again').hidden")
        page.run("at.value = 0; at.dispatchEvent(new Event('input'))")
        assert page.run("document.querySelectorAll('#written .block').length") == 1
        assert page.run("document.querySelectorAll('#written .mask').length") > 0
        page.run("at.value = at.max; at.dispatchEvent(new Event('input'))")
        assert page.run("document.getElementById('written').textContent") == expected
        page.click("#play")
        page.until("at.value === at.max && document.getElementById('play').textContent === 'Play again'")
        assert page.run("document.getElementById('written').textContent") == expected
        # What means nothing in a mode cannot be set there, and what the server refuses is shown.
        page.run("mode.value = 'ar'; mode.dispatchEvent(new Event('change'))")
        assert page.run("document.getElementById('block_size').disabled")
        page.run("delete document.body.dataset.state; document.getElementById('max_tokens').value = '1000'")
        page.click("#run")
        page.until("document.body.dataset.state === 'failed'")
        assert page.run("document.getElementById('status').textContent").startswith("max_tokens: 1000 new tokens")
        assert [error for error in page.errors if "400" not in error] == []


@pytest.mark.whole
def test_a_signal_lets_what_was_begun_be_finished(process):
    running, url = process
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "max_tokens": 90, "ignore_eos": True, "stream": True, "mode": "ar"}).encode()
    with socket.create_connection((host, int(port)), 120) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        data = client.recv(4096)  # It has begun; a row that is compiled already may even be done.
        running.send_signal(signal.SIGTERM)
        said = running.stderr.readline()
        assert re.fullmatch("ending, once [01] rows are done; a second signal ends at once\n", said), said
        while chunk := client.recv(1 << 16):
            data += chunk
    text = data.decode()
    assert text.startswith("HTTP/1.1 200 OK") and '"finish_reason":"length"' in text and "data: [DONE]" in text
    assert running.wait(60) == 0
    assert running.stderr.read() == ""


HELD = """
import asyncio, sys
from pathlib import Path
from served import Scripted, scripted_service
from twotower_jax.serving.app import make_app
from twotower_jax.serving.connection import bind, serve
async def main():
    engine = Scripted(Path(sys.argv[1]))
    engine.hold = True
    service = scripted_service(Path(sys.argv[1]), engine)
    await serve(make_app(service), service, bind("127.0.0.1", 0))
asyncio.run(main())
"""


def holding(checkpoint) -> subprocess.Popen:
    """A server whose engine never comes to an end."""
    path = os.pathsep.join([str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", HELD, str(checkpoint)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_signal_ends_at_once(checkpoint):
    with holding(checkpoint) as process:
        url = process.stdout.readline().split()[-1]
        body = {"prompt": "a", "max_tokens": 40, "stream": True}
        thread = threading.Thread(target=ask_in_vain, args=(f"{url}/v1/completions", body))
        until_ready(url)
        thread.start()
        while b'num_requests_running{model_name="scripted"} 1.0' not in ask(f"{url}/metrics"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("ending, once 1 rows are done")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == "error: ended before all requests were answered\n"
        thread.join()


@pytest.mark.whole
def test_a_signal_ends_it_though_nobody_reads_what_it_says(checkpoint):
    with holding(checkpoint) as process:
        assert process.stdout.readline().startswith("serving scripted on ")
        process.stderr.close()
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port={taken}"], "error: --host=127.0.0.1 --port={taken}: Address already in use\n"),
        (["--api_keys=/no/such/file"], "error: --api_keys=/no/such/file: No such file or directory\n"),
        (["--strategy=other"], "error: strategy='other' is unknown: choose one of"),
        (["--host=0.0.0.0", "--port=0", "--mesh=expert=3"], "warning: whoever reaches 0.0.0.0 may"),
    ],
    ids=["port", "keys", "strategy", "host"],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_a_line(checkpoint, flags, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_command("serve", f"--checkpoint={checkpoint}", *(flag.format(taken=port) for flag in flags))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(said.format(taken=port))
    assert "Traceback" not in ended.stderr


def test_a_package_that_is_missing_is_named(checkpoint, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'uvicorn' else find(name, *more)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"--checkpoint={checkpoint}"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == "error: the package 'uvicorn' is not installed; install it: pip install -e '.[serve]'\n"
