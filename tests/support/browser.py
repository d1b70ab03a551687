"""A headless Chromium, driven over its DevTools protocol: pages opened, asked, and photographed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (
        found
        for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := os.environ.get("SHARDLIFT_TEST_CHROMIUM") or shutil.which(name))
    ),
    None,
)
_START_TIMEOUT_S = 60


class Tab:
    """One page. What goes wrong in it (errors, refusals of its policy, requests to elsewhere) is kept in lists."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self.errors: list[str] = []
        self.requested: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(self._answers[number], 60)

    async def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Goes there; returns once the page has loaded."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded.clear()
        answer = await self.call("Page.navigate", url=url)
        assert not answer.get("errorText"), answer
        await asyncio.wait_for(self._loaded.wait(), 60)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def evaluate(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait_for(self, script: str, timeout_s: float = 30.0) -> Any:
        """What `script` gives, once that is true."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not (value := await self.evaluate(script)):
            assert asyncio.get_running_loop().time() < deadline, f"never true: {script}"
            await asyncio.sleep(0.05)
        return value

    async def photograph(self, file: Path, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        image = base64.b64decode(answer["data"])
        file.write_bytes(image)
        return image

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            parameters = told.get("params", {})
            match told.get("method"):
                case None:
                    answer = self._answers.pop(told["id"])
                    if "error" in told:
                        answer.set_exception(AssertionError(told["error"]))
                    else:
                        answer.set_result(told["result"])
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Runtime.exceptionThrown":
                    self.errors.append(str(parameters["exceptionDetails"]))
                case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                    self.errors.append(parameters["entry"]["text"])
                case "Network.requestWillBeSent":
                    self.requested.append(parameters["request"]["url"])

    async def close(self) -> None:
        await self._socket.close()
        await self._reading


@contextlib.asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """A tab of a browser of its own, which ends with it."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium") as home:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        process = subprocess.Popen(
            [CHROMIUM, *arguments, "--remote-debugging-port=0", f"--user-data-dir={home}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": home},
        )
        try:
            port = await asyncio.wait_for(asyncio.to_thread(_port, process), _START_TIMEOUT_S)
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json") as answer:
                    (page,) = [each for each in await answer.json() if each["type"] == "page"]
                async with http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    try:
                        yield tab
                    finally:
                        await tab.close()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stderr is not None
            process.stderr.close()


def _port(process: subprocess.Popen[bytes]) -> int:
    """Where it listens, from what it says."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"DevTools listening on" in line:
            return int(line.rpartition(b":")[2].split(b"/")[0])
    raise AssertionError("Chromium ended before it listened")
