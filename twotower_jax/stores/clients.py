"""The three kinds of store: one request each, no tries of its own, and its answer or error in one vocabulary.

A key is an object's name within a bucket (of the Hub, within a repository at a revision). A version is what the store
calls one content of an object: a generation, an ETag, a commit's hash of a file.
"""

import asyncio
import base64
import contextlib
import datetime
import email.utils
import functools
import io
import json
import logging
import os
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

from twotower_jax.stores.retrying import ATTEMPT_SECONDS, Changed, Short, StoreError, Transient

ABSENT = ""  # The version of an object that is not there.
_TRANSIENT = {408, 425, 429, 499, 500, 502, 503, 504}
# What a slow connection needs for large objects, in bytes a second.
_SLOWEST = 1 << 20
# An object of more is sent in parts of this size; a multiple of 256 KiB.
_PART_BYTES = 64 << 20


class Info(NamedTuple):
    """An object: bytes, version, and seconds since it was written by the store's own clock (None: it does not say)."""

    size: int
    version: str
    age: float | None


class Listing(NamedTuple):
    """Objects directly below a prefix, as (key, bytes), and the prefixes below it, each with its slash."""

    objects: list[tuple[str, int]]
    prefixes: list[str]


class Client(Protocol):
    """One bucket. Each method makes one request, which may take `seconds`.

    Raises (all methods):
      FileNotFoundError: no such object, or no such bucket.
      Changed: the object has another version than `expected`.
      Transient, StoreError: see `retrying`.
    """

    writable: bool

    def info(self, key: str, seconds: float) -> Info: ...

    def get(self, key: str, start: int | None, stop: int | None, seconds: float) -> bytes: ...

    def put(self, key: str, data: Any, expected: str | None, seconds: float) -> str: ...

    def delete(self, key: str, expected: str | None, seconds: float) -> None: ...

    def list(self, prefix: str, deep: bool, seconds: float, limit: int | None = None) -> Listing: ...


class _Loop:
    """Runs coroutines of a library in its own thread, with a limit of time."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop

    def __call__(self, coroutine: Coroutine, seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            raise Transient(str(error) or f"no answer within {seconds:.0f} s") from error
        finally:
            future.cancel()


def _need(module: str, scheme: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs the package {error.name or module}: python -m pip install 'twotower_jax[stores]'"
        ) from None


def _within[T](seconds: float, what: str, action: Callable[[], T]) -> T:
    """What an action returns that cannot be told to hurry; its thread is left alone if it takes too long."""
    box: list[Any] = []

    def work() -> None:
        try:
            box.append((action(), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise Transient(f"{what} within {seconds:.0f} s")
    if box[0][1] is not None:
        raise box[0][1]
    return box[0][0]


def _of_status(status: int, said: str) -> Exception:
    """The error for an HTTP status that is none of success."""
    said = " ".join(said.split())[:200]
    if status == 404:
        return FileNotFoundError(said)
    if status in (409, 412):
        return Changed("another version is there")
    if status in _TRANSIENT:
        return Transient(f"the store answers {status}{f' ({said})' if said else ''}")
    if status == 401:
        return StoreError(f"the store wants credentials (401{f': {said}' if said else ''})")
    if status == 403:
        return StoreError(f"the store forbids it (403{f': {said}' if said else ''})")
    return StoreError(f"the store answers {status}{f' ({said})' if said else ''}")


def _time_for(seconds: float, size: int) -> float:
    """How long a transfer may take."""
    return min(seconds, ATTEMPT_SECONDS + size / _SLOWEST) if size < _SLOWEST else seconds + size / _SLOWEST


class Gs:
    """A bucket of Google Cloud Storage, over gcsfs; STORAGE_EMULATOR_HOST names another server."""

    writable = True

    def __init__(self, bucket: str):
        self._bucket = bucket
        self._fs, self._run = _gs_system()

    def info(self, key: str, seconds: float) -> Info:
        headers, content = self._call("GET", "b/{}/o/{}", self._bucket, key, seconds=seconds)
        found = _parsed(content)
        return Info(int(found["size"]), str(found["generation"]), _age(headers, found.get("updated")))

    def get(self, key: str, start: int | None, stop: int | None, seconds: float) -> bytes:
        head = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}
        url = f"{self._fs._location}/storage/v1/b/{_quoted(self._bucket)}/o/{_quoted(key)}"
        size = 0 if start is None else stop - start
        headers, content = self._call("GET", url, headers=head, alt="media", seconds=_time_for(seconds, size))
        if start is None:
            _check_crc(headers.get("x-goog-hash", ""), content)
        return content

    def put(self, key: str, data: Any, expected: str | None, seconds: float) -> str:
        condition = {} if expected is None else {"ifGenerationMatch": expected or "0"}
        about = {"name": key, "crc32c": _crc32c(data)}
        url = f"{self._fs._location}/upload/storage/v1/b/{_quoted(self._bucket)}/o"
        if len(data) <= _PART_BYTES:
            border = uuid.uuid4().hex.encode()
            kinds = b"Content-Type: application/json; charset=UTF-8", b"Content-Type: application/octet-stream"
            head = b"--%b\r\n%b\r\n\r\n%b\r\n" % (border, kinds[0], json.dumps(about).encode())
            body = b"".join((head, b"--%b\r\n%b\r\n\r\n" % (border, kinds[1]), data, b"\r\n--%b--" % border))
            _, content = self._call(
                "POST",
                url,
                uploadType="multipart",
                headers={"Content-Type": f'multipart/related; boundary="{border.decode()}"'},
                data=io.BytesIO(body),
                seconds=_time_for(seconds, len(data)),
                **condition,
            )
        else:
            content = self._put_in_parts(url, about, data, condition, seconds)
        found = _parsed(content)
        if found.get("crc32c", about["crc32c"]) != about["crc32c"]:
            raise StoreError("the store has other bytes than were sent")
        return str(found["generation"])

    def _put_in_parts(self, url: str, about: dict, data: Any, condition: dict, seconds: float) -> bytes:
        head = {"X-Upload-Content-Type": "application/octet-stream"}
        headers, _ = self._call(
            "POST", f"{url}?name={_quoted(about['name'])}", uploadType="resumable", json=about, headers=head,
            seconds=seconds, **condition,
        )  # fmt: skip
        place, view, content = headers["Location"], memoryview(data), b""
        for start in range(0, len(view), _PART_BYTES):
            part = view[start : start + _PART_BYTES]
            span = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(view)}"}
            _, content = self._call(
                "PUT", place, headers=span, data=io.BytesIO(part), seconds=_time_for(seconds, len(part))
            )
        return content

    def delete(self, key: str, expected: str | None, seconds: float) -> None:
        condition = {} if expected is None else {"ifGenerationMatch": expected}
        self._call("DELETE", "b/{}/o/{}", self._bucket, key, seconds=seconds, **condition)

    def list(self, prefix: str, deep: bool, seconds: float, limit: int | None = None) -> Listing:
        objects, prefixes, page = [], [], None
        while True:
            options = {"prefix": prefix} | ({} if deep else {"delimiter": "/"})
            options |= ({"pageToken": page} if page else {}) | ({"maxResults": limit} if limit else {})
            _, content = self._call("GET", "b/{}/o", self._bucket, seconds=seconds, **options)
            found = _parsed(content)
            objects += [(item["name"], int(item["size"])) for item in found.get("items", [])]
            prefixes += found.get("prefixes", [])
            page = found.get("nextPageToken")
            if not page or limit:
                return Listing(objects, prefixes)

    def _call(self, method: str, path: str, *arguments: str, seconds: float, **options) -> tuple[Any, bytes]:
        import aiohttp
        import requests.exceptions
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        try:
            return self._run(self._fs._call(method, path, *arguments, **options), seconds)
        except FileNotFoundError:
            raise FileNotFoundError("no such object") from None
        except FileExistsError:
            raise Changed("another version is there") from None
        except HttpError as error:
            raise _of_status(int(error.code or 500), str(error.message)) from None
        except requests.exceptions.ProxyError:  # gcsfs's word for 502
            raise Transient("the store answers 502") from None
        except GoogleAuthError as error:
            raise StoreError(f"no credentials ({str(error).splitlines()[0]}); {_GS_LOGIN}") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Transient(_said(error)) from None
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if str(error).startswith("Forbidden"):
                raise _of_status(403, str(error).partition("\n")[2]) from None
            raise Transient(_said(error)) from None
        except ValueError as error:  # gcsfs's word for 400
            raise StoreError(f"the store refuses it ({' '.join(str(error).split())[:200]})") from None


_GS_LOGIN = "run `gcloud auth application-default login`, or let GOOGLE_APPLICATION_CREDENTIALS name a key file"


@functools.cache
def _gs_system() -> tuple[Any, _Loop]:
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for credentials of its own
    _need("gcsfs", "gs")
    import aiohttp
    import gcsfs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it says is raised as well

    class Once(gcsfs.GCSFileSystem):
        """Makes each request once."""

        _request = gcsfs.GCSFileSystem._request.__wrapped__

    limits = aiohttp.ClientTimeout(total=None, sock_connect=ATTEMPT_SECONDS / 2, sock_read=ATTEMPT_SECONDS)
    make = lambda: Once(requests_timeout=limits, use_listings_cache=False, skip_instance_cache=True)  # noqa: E731
    try:
        system = _within(ATTEMPT_SECONDS, "no answer about credentials", make)
    except Transient as error:
        raise StoreError(f"gs://: {error}; {_GS_LOGIN}") from None
    return system, _Loop(system.loop)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise Short("an answer came that is not whole") from None


def _said(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def _crc32c(data: Any) -> str:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    checksum.update(data if isinstance(data, bytes) else bytes(data))
    return base64.b64encode(checksum.digest()).decode()


def _check_crc(header: str, content: bytes) -> None:
    for part in header.split(","):
        name, _, value = part.strip().partition("=")
        if name == "crc32c" and value != _crc32c(content):
            raise Short(f"{len(content)} bytes came that are not what the store says they are")


def _age(headers: Any, updated: str | None) -> float | None:
    """Seconds between a time as JSON has it and the time of the answer."""
    now = headers.get("Date")
    if updated is None or now is None:
        return None
    with contextlib.suppress(ValueError):
        return (email.utils.parsedate_to_datetime(now) - datetime.datetime.fromisoformat(updated)).total_seconds()
    return None


class S3:
    """A bucket of S3 or what speaks like it, over s3fs; AWS_ENDPOINT_URL names another server."""

    writable = True

    def __init__(self, bucket: str):
        self._bucket = bucket
        self._fs, self._run = _s3_system()

    def info(self, key: str, seconds: float) -> Info:
        found = self._call("head_object", seconds, Key=key)
        updated, now = found.get("LastModified"), found["ResponseMetadata"]["HTTPHeaders"].get("date")
        age = None if None in (updated, now) else (email.utils.parsedate_to_datetime(now) - updated).total_seconds()
        return Info(int(found["ContentLength"]), found["ETag"], age)

    def get(self, key: str, start: int | None, stop: int | None, seconds: float) -> bytes:
        span = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}
        size = 0 if start is None else stop - start
        return self._call("get_object", _time_for(seconds, size), Key=key, **span)

    def put(self, key: str, data: Any, expected: str | None, seconds: float) -> str:
        condition = {} if expected is None else {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        found = self._call("put_object", _time_for(seconds, len(data)), Key=key, Body=bytes(data), **condition)
        return found["ETag"]

    def delete(self, key: str, expected: str | None, seconds: float) -> None:
        if expected is not None and self.info(key, seconds).version != expected:
            raise Changed("another version is there")
        self._call("delete_object", seconds, Key=key)

    def list(self, prefix: str, deep: bool, seconds: float, limit: int | None = None) -> Listing:
        objects, prefixes, page = [], [], None
        while True:
            options = {"Prefix": prefix} | ({} if deep else {"Delimiter": "/"})
            options |= ({"ContinuationToken": page} if page else {}) | ({"MaxKeys": limit} if limit else {})
            found = self._call("list_objects_v2", seconds, **options)
            objects += [(item["Key"], int(item["Size"])) for item in found.get("Contents", [])]
            prefixes += [item["Prefix"] for item in found.get("CommonPrefixes", [])]
            page = found.get("NextContinuationToken")
            if not page or limit:
                return Listing(objects, prefixes)

    def _call(self, method: str, seconds: float, **options) -> Any:
        from botocore import exceptions

        async def request() -> Any:
            await self._fs.set_session()
            client = await self._fs.get_s3(self._bucket)
            found = await getattr(client, method)(Bucket=self._bucket, **options)
            if method != "get_object":
                return found
            async with found["Body"] as body:
                return await body.read()

        try:
            return self._run(request(), seconds)
        except exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            raise _of_status(status, error.response.get("Error", {}).get("Message", "")) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise StoreError(f"no credentials ({error}); {_S3_LOGIN}") from None
        except (exceptions.BotoCoreError, TimeoutError) as error:
            raise Transient(_said(error)) from None
        except OSError as error:
            raise error if isinstance(error, StoreError) else Transient(_said(error)) from None
        except Exception as error:  # aiohttp's of a body that ends early
            if type(error).__module__.startswith("aio"):
                raise Transient(_said(error)) from None
            raise


_S3_LOGIN = "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@functools.cache
def _s3_system() -> tuple[Any, _Loop]:
    _need("s3fs", "s3")
    import s3fs

    limits = {"connect_timeout": ATTEMPT_SECONDS / 2, "read_timeout": ATTEMPT_SECONDS}
    options = {**limits, "retries": {"total_max_attempts": 1}, "max_pool_connections": 32}
    system = s3fs.S3FileSystem(config_kwargs=options, use_listings_cache=False, skip_instance_cache=True)
    return system, _Loop(system.loop)


class Hub:
    """A repository of the Hugging Face Hub at a revision, over huggingface_hub; HF_ENDPOINT names another server."""

    writable = False

    def __init__(self, repository: str):
        self._repository = repository
        self._fs = _hub_system()

    def info(self, key: str, seconds: float) -> Info:
        found = self._call(seconds, lambda: self._fs.info(self._path(key), refresh=True))
        if found["type"] != "file":
            raise FileNotFoundError("no such file")
        version = (found.get("lfs") or {}).get("sha256") or found.get("blob_id") or ""
        return Info(int(found["size"]), str(version), None)

    def get(self, key: str, start: int | None, stop: int | None, seconds: float) -> bytes:
        size = 0 if start is None else stop - start
        return self._call(_time_for(seconds, size), lambda: self._fs.cat_file(self._path(key), start=start, end=stop))

    def put(self, key: str, data: Any, expected: str | None, seconds: float) -> str:
        raise StoreError("the Hub is only read; write to a folder, gs:// or s3://, and upload that (hf upload)")

    def delete(self, key: str, expected: str | None, seconds: float) -> None:
        raise StoreError("the Hub is only read")

    def list(self, prefix: str, deep: bool, seconds: float, limit: int | None = None) -> Listing:
        folder = prefix.rstrip("/")
        found = self._call(
            seconds, lambda: self._fs.find(self._path(folder), withdirs=True, maxdepth=None if deep else 1, detail=True)
        )
        cut = len(self._repository) + 1
        of_kind = {kind: [i for i in found.values() if i["type"] == kind] for kind in ("file", "directory")}
        objects = [(item["name"][cut:], int(item["size"])) for item in of_kind["file"]]
        prefixes = [f"{name}/" for item in of_kind["directory"] if (name := item["name"][cut:]) not in ("", folder)]
        return Listing(objects, [] if deep else prefixes)

    def _path(self, key: str) -> str:
        return f"{self._repository}/{key}" if key else self._repository

    def _call(self, seconds: float, action: Callable[[], Any]) -> Any:
        from huggingface_hub import errors

        try:
            return _within(min(seconds, ATTEMPT_SECONDS + seconds / 2), "no answer from the Hub", action)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise StoreError(f"the Hub has no such repository or revision, or not for you ({_said(error)})") from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 500)
            raise _of_status(status, _said(error)) from None
        except FileNotFoundError:
            raise FileNotFoundError("no such file") from None
        except TimeoutError as error:
            raise Transient(_said(error)) from None
        except Exception as error:  # of its HTTP library, whichever that is
            if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise Transient(_said(error)) from None
            raise


@functools.cache
def _hub_system() -> Any:
    _need("huggingface_hub", "hf")
    import huggingface_hub

    endpoint = os.environ.get("HF_ENDPOINT")
    return huggingface_hub.HfFileSystem(endpoint=endpoint, use_listings_cache=False, skip_instance_cache=True)


KINDS: dict[str, Callable[[str], Client]] = {"gs": Gs, "s3": S3, "hf": Hub}


@functools.cache
def client(scheme: str, bucket: str) -> Client:
    """The client of a bucket, made when it is first asked for.

    Raises:
      ValueError: naming the extra whose package is missing.
      StoreError: if there are no credentials.
    """
    return KINDS[scheme](bucket)


def forget() -> None:
    """Has clients made anew, where the environment names another server or other credentials."""
    for made in (client, _gs_system, _s3_system, _hub_system):
        made.cache_clear()
