"""A server of `potexport serve` in a process of its own, on a free port of loopback."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

from tests.load import Server

ROOT = Path(__file__).parents[1]
SECONDS = 60  # to start, and to end


class Running:
    """A server, what it said so far, and clients of it."""

    def __init__(self, process: subprocess.Popen[str], key: str) -> None:
        self.process, self.lines = process, list[str]()
        self._key = key
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(SECONDS), self.lines
        found = re.search(r"^(.*): http://([^:]+):(\d+)/v1$", "\n".join(self.lines), re.MULTILINE)
        assert found, self.lines
        self.server = Server(found[2], int(found[3]), found[1], key)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if "http://" in line:
                self._ready.set()
        self._ready.set()  # it ended

    @property
    def url(self) -> str:
        return f"http://{self.server.host}:{self.server.port}"

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=0, timeout=SECONDS)

    def memory(self) -> int:
        """Bytes that it holds, without the pages of files that it maps."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        assert found, status
        return int(found[1]) * 1024

    def end(self) -> int:
        """As a service manager does; its exit code."""
        self.process.terminate()
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code


@contextmanager
def serving(bundle: Path, *options: object, key: str = "none-needed") -> Iterator[Running]:
    command = [sys.executable, "-m", "potexport", "serve", bundle, "--port", 0, *options]
    process = subprocess.Popen(
        [str(each) for each in command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        yield Running(process, key)
    finally:
        process.kill()
        process.wait()
