"""A server on this machine that has one data set as the Hugging Face Hub does, to be read."""

import contextlib
import email.message
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

from twotower_jax.stores import clients

NAME = "org/texts"
COMMIT = "0" * 40


@contextlib.contextmanager
def serves(folder: pathlib.Path) -> Iterator[list[str]]:
    """Has hf://datasets/org/texts be the files of a folder while the block runs; the requests for their bytes."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802 (http.server's name)
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            if found := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.+)", path):
                self._file(found[1])
            elif found := re.fullmatch(rf"/api/datasets/{NAME}/tree/[^/]+(?:/(.+))?", path):
                deep = "recursive=true" in self.path.lower()
                self._answer(200, [_about(folder, file) for file in _below(folder / (found[1] or ""), deep)])
            elif re.fullmatch(rf"/api/datasets/{NAME}(/revision/[^/]+)?", path):
                self._answer(200, {"id": NAME, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
            else:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            kind = email.message.Message()
            kind["Content-Type"] = self.headers["Content-Type"]
            fields = json.loads(body) if kind.get_content_type() == "application/json" else urllib.parse.parse_qs(body)
            paths = fields["paths"] if isinstance(fields["paths"], list) else [fields["paths"]]
            self._answer(200, [_about(folder, folder / name) for name in paths if (folder / name).exists()])

        def _file(self, name: str) -> None:
            if not (folder / name).is_file():
                self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            content, status = (folder / name).read_bytes(), 200
            heads = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(span[1]), int(span[2]) + 1 if span[2] else len(content)
                heads["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
                content, status = content[start:stop], 206
            asked.append(f"{name} {len(content)}")
            self._send(status, content, heads)

        def _answer(self, status: int, value: object, heads: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (heads or {}))

        def _send(self, status: int, content: bytes, heads: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | heads).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ.get("HF_ENDPOINT")
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    clients.forget()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        if before is None:
            del os.environ["HF_ENDPOINT"]
        else:
            os.environ["HF_ENDPOINT"] = before
        clients.forget()


def _below(folder: pathlib.Path, deep: bool) -> list[pathlib.Path]:
    return sorted(folder.rglob("*") if deep else folder.iterdir()) if folder.is_dir() else []


def _about(folder: pathlib.Path, file: pathlib.Path) -> dict[str, object]:
    name = str(file.relative_to(folder))
    if file.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
    content = file.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
