"""Serves the page, one bundle and onnxruntime-web to the browsers of this machine.

Decides what can be asked for: a list of files made when it starts, and nothing else. Reads alone.
"""

from __future__ import annotations

import shutil
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from potexport.bundle import MANIFEST, Manifest
from potexport.errors import PotexportError
from potexport.web import ort_web

PAGE = Path(__file__).parent / "page"
LOOPBACK = "127.0.0.1"
BYTES = "application/octet-stream"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
HEADERS = {
    # Scripts are ours and onnxruntime-web's, from here; the page can send nothing elsewhere.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; "
    "worker-src 'self'; connect-src 'self'; style-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    # Without these two a browser gives WebAssembly no threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def check(manifest: Manifest) -> None:
    """PotexportError for a bundle that the page cannot run."""
    if manifest.target != "web":
        raise PotexportError(
            f"the bundle is for the target {manifest.target}, and a browser needs another form; "
            "build it with: potexport build --target web"
        )


def files(bundle: Path, manifest: Manifest, ort: Path) -> dict[str, Path]:
    """What is served: path of the URL -> file."""
    found = {f"/{path.name}": path for path in PAGE.iterdir() if path.is_file()}
    found |= {f"/ort/{name}": ort / name for name in ort_web.FILES}
    found |= {f"/bundle/{name}": bundle / name for name in (MANIFEST, *manifest.files)}
    return {**found, "/": PAGE / "index.html"}


def _type(asked: str, suffix: str) -> str:
    """Of a bundle's files only data: none of them is a page or a script of ours."""
    known = suffix == ".json" or not asked.startswith("/bundle/")
    return TYPES.get(suffix, BYTES) if known else BYTES


class Server(ThreadingHTTPServer):
    """On loopback alone. port: 0 for any that is free."""

    daemon_threads = True

    def __init__(
        self,
        served: dict[str, Path],
        *,
        port: int = 0,
        handler: type[BaseHTTPRequestHandler] | None = None,
    ) -> None:
        """handler: one that answers more, for tests."""
        self.served = served
        try:
            super().__init__((LOOPBACK, port), handler or Handler)
        except OSError as error:
            raise PotexportError(
                f"port {port} cannot be used: {error.strerror}; choose another --port, or omit it"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with files of the list."""

    server: Server
    server_version, sys_version = "potexport", ""

    def do_GET(self) -> None:
        self._answer(content=True)

    def do_HEAD(self) -> None:
        self._answer(content=False)

    def _answer(self, *, content: bool) -> None:
        # A name that leads here from elsewhere (DNS rebinding) is not ours.
        port = self.server.server_port
        hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}
        if port == 80:  # which browsers leave out
            hosts |= {LOOPBACK, "localhost"}
        if self.headers.get("Host") not in hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        asked = self.path.partition("?")[0]
        path = self.server.served.get(asked)
        if path is None or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _type(asked, path.suffix))
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            if content:
                self._copy(file)

    def _copy(self, file: BinaryIO) -> None:
        try:
            shutil.copyfileobj(file, self.wfile, 1 << 20)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser went away

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: what a person reads is nobody else's business."""
