"""A headless Chromium, driven through the pipe of its DevTools protocol, so that nothing else is needed."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# No sandbox, because tests may run as root; and nothing that would look for hosts outside.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One page of a browser of its own.

    Attributes:
      errors: what scripts and the console have complained about.
    """

    def __init__(self, url: str):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The protocol is spoken on file descriptors 3 and 4.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=[theirs_in, theirs_out],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", None
        self.errors: list[str] = []
        try:
            self._open(url)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._say("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"never: {script}; {self.errors}")
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Clicks with the mouse into the middle of an element."""
        place = self.run(
            f"{{ const element = document.querySelector({json.dumps(selector)});"
            " element.scrollIntoView({block: 'center'}); const box = element.getBoundingClientRect();"
            " [box.x + box.width / 2, box.y + box.height / 2] }"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._say("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self) -> str:
        """A picture of it, PNG in base 64."""
        return self._say("Page.captureScreenshot")["data"]

    def _open(self, url: str) -> None:
        target = self._say("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._say(f"{domain}.enable")
        self._say("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def _say(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._hear()).get("id") != self._number:
            kind, told = answer.get("method"), answer.get("params", {})
            if kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and told["entry"]["level"] == "error"):
                self.errors.append(json.dumps(told))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], 60)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
