"""A headless Chromium, driven over its DevTools protocol: pages opened, asked, and photographed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

CHROMIUM = next(
    (
        found
        for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := os.environ.get("SHARDLIFT_TEST_CHROMIUM") or shutil.which(name))
    ),
    None,
)
_START_TIMEOUT_S = 60
# "Inspected target navigated or closed", "Cannot find default execution context", ...
_LEFT = -32000


class LeftError(Exception):
    """The page that was asked is not there any more."""


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

    async def wait_for(self, script: str, timeout_s: float = 30.0) -> None:
        """Returns once `script` is true, over whatever the tab goes to meanwhile."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            with contextlib.suppress(LeftError):
                if await self.evaluate(f"!!({script})"):
                    return
            assert asyncio.get_running_loop().time() < deadline, f"never true: {script}"
            await asyncio.sleep(0.05)

    async def photograph(self, file: Path, *, of: str = "") -> bytes:
        """A PNG of the window, or of the one element that is `of`; also written to `file`."""
        clip = {}
        if of:
            script = "(({x, y, width, height}) => ({x: x + scrollX, y: y + scrollY, width, height, scale: 1}))"
            script += f"(document.querySelector({json.dumps(of)}).getBoundingClientRect())"
            clip = {"clip": await self.evaluate(script), "captureBeyondViewport": True}
        answer = await self.call("Page.captureScreenshot", format="png", **clip)
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
                        left = told["error"]["code"] == _LEFT
                        answer.set_exception((LeftError if left else AssertionError)(told["error"]))
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
            start_new_session=True,
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
            # With its helpers, of which some would stay.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def extent(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    width, height = struct.unpack_from(">II", png, 16)
    return width, height


def pixels(png: bytes) -> NDArray[np.uint8]:
    """[height, width, 3] of a PNG of 8 bits a channel, not interlaced. Source: PNG specification, 2003, section 9."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, header, data = 8, b"", b""
    while at < len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        body = png[at + 8 : at + 8 + size]
        header = body if kind == b"IHDR" else header
        data += body if kind == b"IDAT" else b""
        at += size + 12
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    channels = {2: 3, 6: 4}[colour]
    assert (depth, interlaced) == (8, 0)
    rows = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, 1 + width * channels)
    image = np.zeros((height + 1, width + 1, channels), dtype=np.int64)  # with the pixels before the first ones
    for y in range(height):
        kind, row = rows[y, 0], rows[y, 1:].reshape(width, channels).astype(np.int64)
        above = image[y, 1:]
        if kind == 0:
            image[y + 1, 1:] = row
        elif kind == 1:
            image[y + 1, 1:] = np.cumsum(row, axis=0) % 256
        elif kind == 2:
            image[y + 1, 1:] = (row + above) % 256
        else:
            for x in range(width):
                left, up, corner = image[y + 1, x], image[y, x + 1], image[y, x]
                if kind == 3:
                    guess = (left + up) // 2
                else:
                    toward = left + up - corner
                    away = abs(toward - left), abs(toward - up), abs(toward - corner)
                    nearest = np.where(away[1] <= away[2], up, corner)
                    guess = np.where((away[0] <= away[1]) & (away[0] <= away[2]), left, nearest)
                image[y + 1, x + 1] = (row[x] + guess) % 256
    return image[1:, 1:, :3].astype(np.uint8)


def _port(process: subprocess.Popen[bytes]) -> int:
    """Where it listens, from what it says."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"DevTools listening on" in line:
            return int(line.rpartition(b":")[2].split(b"/")[0])
    raise AssertionError("Chromium ended before it listened")
