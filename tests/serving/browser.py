"""A headless Chromium with one tab, spoken to over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ports import free_port
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One page."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.errors: list[str] = []
        """Uncaught exceptions and failed requests of the page."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._connection.recv(timeout=60))
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(said["params"])[:500])
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, condition: str, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, (self.evaluate("document.body.innerText"), self.errors)
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def browse(browser: str, folder: Path, address: str, *, dark: bool = False) -> Iterator[Tab]:
    """Open an address in a fresh profile."""
    port = free_port()
    process = subprocess.Popen(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--remote-debugging-port={port}", f"--user-data-dir={folder / 'profile'}", "--window-size=1100,980",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with connect(_tab_address(port), max_size=None, open_timeout=30) as connection:
            tab = Tab(connection)
            for domain in ("Page", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            tab.call("Emulation.setEmulatedMedia", features=scheme)
            tab.call("Page.navigate", url=address)
            yield tab
    finally:
        process.terminate()
        process.wait(30)


def _tab_address(port: int) -> str:
    for _ in range(300):
        try:
            tabs = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5).read())
            return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        except (OSError, StopIteration):
            time.sleep(0.1)
    raise TimeoutError("the browser did not start")
