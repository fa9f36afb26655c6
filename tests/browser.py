"""A headless Chromium at a page that the project's own server gives, whose script tells what it
found by POST."""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potexport.web import serve

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
]


class Told(serve.Handler):
    found: queue.Queue[Any]

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.found.put(json.loads(body))
        self.send_response(204)
        self.end_headers()


@contextmanager
def serving(served: dict[str, Path], handler: type[serve.Handler] = serve.Handler) -> Iterator[str]:
    with serve.Server(served, handler=handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class Pipe:
    """What Chromium's developer tools take and give, by its file descriptors 3 and 4."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        theirs, self._out = os.pipe()
        self._in, back = os.pipe()
        # Not by a shell: some take no descriptor of two digits.
        program = f"import os, sys; os.dup2({theirs}, 3); os.dup2({back}, 4); "
        shell = [sys.executable, "-c", program + "os.execvp(sys.argv[1], sys.argv[1:])"]
        self.process = subprocess.Popen(
            [*shell, *command],
            env=environment,
            pass_fds=(theirs, back),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self._number, self._held = 0, b""

    def ask(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if session:
            asked["sessionId"] = session
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                return answer.get("result") or answer

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("Chromium ended")
            self._held += data
        message, _, self._held = self._held.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def page(self) -> str:
        """A session with the first page."""
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(each for each in targets if each["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        return str(attached["sessionId"])

    def picture(self) -> bytes:
        """PNG of the first page."""
        data = self.ask("Page.captureScreenshot", self.page(), format="png")["data"]
        return base64.b64decode(data)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._out)
        os.close(self._in)


def in_browser(
    browser: str,
    served: dict[str, Path],
    page: str,
    profile: Path,
    *,
    flags: tuple[str, ...] = (),
    seconds: int = 120,
    at_end: Callable[[Pipe], None] = lambda _: None,
) -> Any:
    """What the page's script tells of itself; `at_end` is called while it is still shown."""

    class Here(Told):
        found = queue.Queue()

    with serving(served, Here) as url:
        command = [browser, *FLAGS, *flags, "--remote-debugging-pipe",
                   f"--user-data-dir={profile}", url + page]  # fmt: skip
        pipe = Pipe(command, {**os.environ, "HOME": str(profile)})
        try:
            told = Here.found.get(timeout=seconds)
            at_end(pipe)
        finally:
            pipe.end()
    if isinstance(told, dict) and "failed" in told:
        raise AssertionError(told["failed"])
    return told
