"""Chromium without a driver and without a port: the DevTools protocol over two pipes, one JSON text per NUL byte."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
_FLAGS = ("--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking")
_ROOT = ("--no-sandbox",)  # Chromium refuses its sandbox to root


class Browser:
    """One page in a headless Chromium. Everything that the page logs, throws or fetches is kept in `events`."""

    def __init__(self) -> None:
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        if binary is None:
            raise RuntimeError("Chromium is not installed: sudo apt-get install -y chromium")
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()
        root = _ROOT if os.geteuid() == 0 else ()
        # a shell gives the two pipes the numbers 3 and 4, which Chromium reads and writes
        script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
        options = [*_FLAGS, *root, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, binary, *options],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._out, self._in = os.fdopen(ours, "wb", buffering=0), os.fdopen(theirs, "rb")
        self._number, self._rest, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._in.fileno(), 1 << 20)
            if not block:
                raise RuntimeError("Chromium ended in the middle of a conversation")
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        found = dict(json.loads(text))
        if "id" not in found:
            self.events.append(found)
        return found

    def open(self, path: Path, width: int, height: int = 900, *, dark: bool = False, script: bool = True) -> None:
        """Load a file at a width in CSS pixels and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's result."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "JavaScript failed"))
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """A PNG of what is visible."""
        self.value("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the page itself."""
        found = []
        for event in self.events:
            method, data = event["method"], event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {data['exceptionDetails'].get('text')}")
            elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
                found.append(f"console: {data['args']}")
            elif method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {data['entry']['text']}")
            elif method == "Network.requestWillBeSent" and not data["request"]["url"].startswith(("file:", "data:")):
                found.append(f"fetched {data['request']['url']}")
        return found

    def close(self) -> None:
        """End the browser and forget its profile."""
        self._process.terminate()
        self._process.wait(timeout=TIMEOUT)
        self._in.close()
        self._out.close()
        self._profile.cleanup()
