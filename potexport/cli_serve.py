"""The command that serves a bundle; `cli` adds it to its group."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potexport.cli_parts import COUNT, compressing, opened, opening
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from potexport.runtime.session import Session


@click.command(short_help="Serve a bundle to OpenAI's clients.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", help="Address to listen on. [127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=8080,
              help="0 takes a free one. [8080]")  # fmt: skip
@click.option("--name", help="Of the model, as requests name it. Default: the folder's, without "
              ".bundle.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="PATH",
              help="A key in each line, one of which a request must have; so may the variable "
              "POTEXPORT_API_KEY. Default: nobody is asked.")  # fmt: skip
@click.option("--sessions", type=COUNT, default=8, metavar="POTS",
              help="Conversations held in memory. [8]")  # fmt: skip
@click.option("--state", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the others are held, and all of them when the server ends. Default: a "
              "temporary folder.")  # fmt: skip
@click.option("--state-gb", type=click.FloatRange(min=0), default=8.0, metavar="GB",
              help="At most so much there; the longest unused go. [8]")  # fmt: skip
@click.option("--queue", type=COUNT, default=64, metavar="REQUESTS",
              help="That may wait while one is answered; more get status 429. [64]")  # fmt: skip
@click.option("--connections", type=COUNT, default=256, help="At a time. [256]")
@click.option("--max-tokens", type=COUNT, default=1024, metavar="TOKENS",
              help="Longest answer, whatever a request asks for. [1024]")  # fmt: skip
@click.option("--max-request-bytes", type=COUNT, default=8 << 20, metavar="BYTES",
              help="Longest body of a request. [8388608]")  # fmt: skip
@click.option("--temperature", type=float, default=0.0,
              help="Of requests that name none; 0 takes the likeliest token. [0]")  # fmt: skip
@click.option("--grace", type=click.FloatRange(min=0), default=10.0, metavar="SECONDS",
              help="That answers may still take when the server is told to end. [10]")  # fmt: skip
@compressing
@opening
@click.option("--quiet", is_flag=True, help="No line for each request.")
def serve(bundle: Path, **given: Any) -> None:
    """Serve BUNDLE to OpenAI's clients, over HTTP: /v1/chat/completions, /v1/models, /health and
    /metrics.

    \b
    potexport serve BUNDLE --port 8080
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none python app.py
    """
    _require()
    from potexport.runtime.sampling import Sampling
    from potexport.serving.auth import VARIABLE, Keys
    from potexport.serving.heap import Heap
    from potexport.serving.running import Settings, run

    heap = Heap()
    os.umask(0o077)  # what is said is this user's alone, in a folder of whatever mode
    keys = Keys.read(given.pop("api_key_file"), os.environ.get(VARIABLE))
    name = given.pop("name") or bundle.resolve().name.removesuffix(".bundle")
    Sampling(temperature=given["temperature"])  # refused now, not in every request
    session = _opened(bundle, given)
    with ExitStack() as stack:
        folder = given.pop("state")
        kept = folder is not None
        if not kept:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potexport-")))
        settings = Settings(name=name, folder=folder, kept=kept, **given)
        run(session, settings, keys, heap, tell=_tell)


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _require() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise PotexportError(
            "serving needs starlette, uvicorn and prometheus_client; install them with: pip "
            "install 'potexport[serve]'"
        ) from error


def _opened(bundle: Path, given: dict[str, Any]) -> Session:
    names = ("policy", "keep", "keep_mass", "threads", "backend", "no_check")
    session = opened(bundle, None, None, {name: given.pop(name) for name in names})
    if not session.text.has_template:
        raise PotexportError(
            "the bundle has no chat template, so there are no chats to serve; build one from a "
            "model that was tuned for chats"
        )
    return session
