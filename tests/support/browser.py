"""Headless Chromium, driven through its DevTools protocol: what a page requests, what its console says, what it looks like."""

import asyncio
import base64
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (  # without the last ones it looks for updates
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars", "--remote-debugging-port=0"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


class Browser:
    def __init__(self, directory: Path) -> None:
        self._profile, self._number = directory / "profile", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(20)

    async def _connect(self) -> None:
        file, deadline = self._profile / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n")):
            assert time.monotonic() < deadline, "Chromium did not start"
            await asyncio.sleep(0.05)
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{file.read_text().split()[0]}/json") as answer:
            (page,) = [one for one in await answer.json() if one["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what a command answers."""
        self._number += 1
        return self._loop.run_until_complete(self._send({"id": self._number, "method": method, "params": parameters}))

    async def _send(self, message: dict[str, Any]) -> dict[str, Any]:
        await self._socket.send_json(message)
        while (answer := await self._socket.receive_json(timeout=60)).get("id") != message["id"]:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        """Load a page, and wait until its scripts have run and it is painted."""
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while self.run("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))", awaitPromise=True)

    def run(self, expression: str, **parameters: Any) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, **parameters)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **parameters: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **parameters)

    def look(self, *, width: int, height: int = 900, scheme: str = "light", mobile: bool = False, scale: float = 1.0) -> None:
        """Set the window's size and color scheme."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile)
        self.settle()

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        self.settle()
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def problems(self) -> list[dict[str, Any]]:
        """Return what the console says: uncaught errors, messages, and what the page's policy has refused."""
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Return the URLs that were requested."""
        urls = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]
