"""A headless Chromium, driven through the DevTools protocol (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_START_S = 60.0


class Page:
    """A tab. Every problem that the page reports is in `problems`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._count = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol; its result."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(str(message["params"]))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, timeout_s: float = 30) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := await self.evaluate(script)):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {script}"
            await asyncio.sleep(0.05)
        return value

    async def screenshot(self, path: Path) -> None:
        """Write what the tab shows as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@contextlib.asynccontextmanager
async def open_page(url: str, profile: Path, size: str = "1200,800") -> AsyncIterator[Page]:
    """A tab that shows a URL. profile: a folder for the browser's files."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0", f"--window-size={size}"]
    if os.getuid() == 0:
        flags.append("--no-sandbox")  # the sandbox does not start as root
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        async with aiohttp.ClientSession() as session:
            base = f"http://127.0.0.1:{await _port(profile / 'DevToolsActivePort')}"
            async with session.get(f"{base}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
                yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _port(path: Path) -> int:
    deadline = time.monotonic() + _START_S
    while not (path.exists() and path.read_text().count("\n")):
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.05)
    return int(path.read_text().split("\n")[0])
