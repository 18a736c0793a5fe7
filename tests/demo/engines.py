"""Two browser engines besides Chromium, by the protocols that Debian's packages speak: `open(url)`, `evaluate(script)`.

Firefox listens to WebDriver BiDi on a web socket; WebKitGTK's driver takes WebDriver commands over HTTP and wants a screen,
which Xvfb gives it. A script is an expression whose value is JSON.
"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from studio_page import free_port


MINI_BROWSER = "/usr/lib/*-linux-gnu/webkit2gtk-4.1/MiniBrowser"
NEEDS = {
    "firefox": ["/usr/bin/firefox-esr"],
    "webkit": ["/usr/bin/WebKitWebDriver", "/usr/bin/xvfb-run", MINI_BROWSER],
}


def missing(engine: str) -> list[str]:
    """What of the engine is not installed."""
    return [path for path in NEEDS[engine] if not list(Path("/").glob(path.lstrip("/")))]


@contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A program with its children, in a process group of its own that ends with the block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def firefox(folder: Path) -> Iterator[SimpleNamespace]:
    from websockets.sync.client import connect

    log = folder / "firefox.log"
    profile = folder / "profile"
    profile.mkdir()
    command = ["/usr/bin/firefox-esr", "--headless", "--no-remote", "--profile", str(profile)]
    with started([*command, f"--remote-debugging-port={free_port()}"], log, HOME=str(folder)):
        address = until(lambda: re.search(r"WebDriver BiDi listening on (\S+)", log.read_text()))[1]
        with connect(address + "/session", max_size=None) as socket:

            def call(method: str, **parameters: Any) -> Any:
                call.id += 1
                socket.send(json.dumps({"id": call.id, "method": method, "params": parameters}))
                while (answer := json.loads(socket.recv(timeout=60))).get("id") != call.id:
                    pass
                assert answer["type"] == "success", answer
                return answer["result"]

            call.id = 0
            call("session.new", capabilities={})
            tab = call("browsingContext.getTree")["contexts"][0]["context"]

            def evaluate(script: str) -> Any:
                found = call(
                    "script.evaluate",
                    target={"context": tab},
                    awaitPromise=True,
                    expression=f"JSON.stringify({script})",
                )
                assert found["type"] == "success", found
                return json.loads(found["result"].get("value", "null"))

            yield SimpleNamespace(
                open=lambda url: call("browsingContext.navigate", context=tab, url=url, wait="complete"),
                evaluate=evaluate,
            )


@contextmanager
def webkit(folder: Path) -> Iterator[SimpleNamespace]:
    port = free_port()
    command = ["xvfb-run", "--auto-servernum", "/usr/bin/WebKitWebDriver", f"--port={port}"]
    # Its sandbox needs rights that a container does not have.
    with started(command, folder / "webkit.log", WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS="1"):

        def call(method: str, path: str, body: Any = None) -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}",
                method=method,
                data=None if body is None else json.dumps(body).encode(),
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]

        def ready() -> bool:
            try:
                return call("GET", "/status")["ready"]
            except OSError:
                return False

        until(ready)
        binary = next(Path("/").glob(MINI_BROWSER.lstrip("/")))
        options = {"webkitgtk:browserOptions": {"binary": str(binary), "args": ["--automation"]}}
        session = "/session/" + call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        try:
            yield SimpleNamespace(
                open=lambda url: call("POST", session + "/url", {"url": url}),
                evaluate=lambda script: json.loads(
                    call("POST", session + "/execute/sync", {"script": f"return JSON.stringify({script})", "args": []})
                    or "null"
                ),
            )
        finally:
            call("DELETE", session)


def until(condition: Any, seconds: float = 120.0) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


ENGINES = {"firefox": firefox, "webkit": webkit}
