"""Headless Chromium over the DevTools protocol, through pipes (file descriptors 3 and 4): no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium-headless-shell", "chromium", "chrome-headless-shell", "google-chrome", "chromium-browser")


def find() -> str | None:
    """FASTSSL_BROWSER, or the first of NAMES that is installed."""
    return os.environ.get("FASTSSL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page; `console` holds errors, warnings and exceptions, `requests` every URL that was asked for."""

    def __init__(self, folder, width: int = 1280, height: int = 900, timeout: float = 60):
        self.console, self.requests, self.loaded = [], [], False
        self._timeout, self._count, self._buffer = timeout, 0, b""
        ours, theirs = os.pipe(), os.pipe()  # commands to it, messages from it
        command = [
            find(),
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={folder}",
            f"--window-size={width},{height}",
        ]

        # The child finds the pipes at 3 and 4: a shell puts them there.
        shell = f'exec 3<&{ours[0]} 4>&{theirs[1]}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = ours[1], theirs[0]
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._send("Browser.close")
        except (OSError, TimeoutError):
            self._process.kill()
        os.close(self._out)
        os.close(self._in)
        self._process.wait(20)

    def call(self, method: str, **params) -> dict:
        return self._send(method, self._session, **params)

    def open(self, url: str) -> None:
        self.loaded = False
        self.call("Page.navigate", url=url)
        until = time.monotonic() + self._timeout
        while not self.loaded and time.monotonic() < until:
            self._receive(0.2)
        assert self.loaded, f"{url} was not loaded in {self._timeout:g} s"

    def value(self, script: str):
        """The value of a JavaScript expression, converted by JSON."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, media: str = "", scheme: str = "light") -> None:
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path, whole: bool = True) -> None:
        made = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=whole,
            **(
                {
                    "clip": {
                        "x": 0,
                        "y": 0,
                        "scale": 1,
                        "width": self.value("document.documentElement.scrollWidth"),
                        "height": self.value("document.documentElement.scrollHeight"),
                    }
                }
                if whole
                else {}
            ),
        )
        with open(path, "wb") as f:
            f.write(base64.b64decode(made["data"]))

    def _send(self, method: str, session: str | None = None, **params) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._timeout
        while time.monotonic() < until:
            for answer in self._receive(0.2):
                if answer.get("id") == self._count:
                    assert "error" not in answer, (method, answer["error"])
                    return answer["result"]
        raise TimeoutError(f"{find()} did not answer {method} in {self._timeout:g} s")

    def _receive(self, wait: float) -> list[dict]:
        if select.select([self._in], [], [], wait)[0]:
            data = os.read(self._in, 1 << 20)
            if not data:
                raise OSError(f"{find()} ended (exit code {self._process.wait(5)})")
            self._buffer += data
        *parts, self._buffer = self._buffer.split(b"\0")
        messages = [json.loads(part) for part in parts]
        for message in messages:
            self._note(message.get("method"), message.get("params", {}))
        return messages

    def _note(self, method: str | None, params: dict) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.console.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
