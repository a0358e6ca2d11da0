"""One tab of a real browser that a test drives, over the pipe that Chromium has for this."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from browser import CHROMIUM
from patience import PATIENCE

__all__ = ["Tab"]

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


class Tab:
    """A tab: https://chromedevtools.github.io/devtools-protocol, messages ended by a zero byte.

    Args:
        home: an empty folder, for the browser's profile.
        window: width and height.
        dark: whether pages are dark.
    """

    def __init__(self, home: Path, window: tuple[int, int], *, dark: bool = False) -> None:
        self.events: list[dict[str, Any]] = []
        self._number = 0
        theirs, self._out = os.pipe()
        self._in, their_out = os.pipe()
        options = (*_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={home}")
        command = shlex.join([CHROMIUM, *options, "about:blank"])
        # the browser reads its commands from 3 and answers to 4
        shell = f"exec 3<&{theirs} 4>&{their_out}; exec {command}"
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell],
            pass_fds=(theirs, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_out)
        self._answers = os.fdopen(self._in, "rb")
        self._rest = b""
        self._session: str | None = None
        tabs = self.call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.look(window, dark=dark)

    def look(self, window: tuple[int, int], *, dark: bool) -> None:
        """Change window and theme."""
        width, height = window
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **sizes, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._in, 2**16)
            assert block, "the browser ended"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.run(f"!!({condition})"):
                return
            time.sleep(0.1)
        raise AssertionError(f"never: {condition}; {self.run('document.body.innerText')}")

    def write(self, where: str, text: str) -> None:
        """Put text into a field, with a keyboard."""
        self.run(f"(e => (e.focus(), e.select?.()))(document.querySelector({json.dumps(where)}))")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            text = "\r" if key == "Enter" and kind == "keyDown" else ""
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text,
                windowsVirtualKeyCode=code,
            )

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """Write a screenshot."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """Return what the browser has logged as wrong: errors, and what policies refused."""
        found = []
        for event in self.events:
            given = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
                found.append(given["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """Return the addresses of all requests."""
        name = "Network.requestWillBeSent"
        sent = (event["params"] for event in self.events if event.get("method") == name)
        return [event["request"]["url"] for event in sent]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._out)  # the browser ends with its pipe
        self._answers.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
