"""A server from its parts, from the first socket to the last saved conversation."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from potexport.runtime.saved import identity
from potexport.runtime.session import Session
from potexport.serving.app import Api
from potexport.serving.auth import LOOPBACK, VARIABLE, Keys
from potexport.serving.engine import Engine
from potexport.serving.heap import Heap
from potexport.serving.metrics import Metrics
from potexport.serving.owning import owned
from potexport.serving.protocol import Served
from potexport.serving.server import listen, serve
from potexport.serving.sessions import Sessions
from potexport.serving.web import Limits

BODY_SECONDS = 60.0  # for a request's body to arrive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As `potexport serve --help` says. kept: whether conversations outlive the server."""

    name: str
    host: str
    port: int
    folder: Path
    kept: bool
    sessions: int
    state_gb: float
    queue: int
    connections: int
    max_tokens: int
    max_request_bytes: int
    temperature: float
    grace: float
    quiet: bool


def run(
    session: Session,
    settings: Settings,
    keys: Keys,
    heap: Heap,
    *,
    tell: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM. tell: takes lines for a log.

    Raises PotexportError for an address or a folder that cannot be had.
    """
    local = is_loopback(settings.host)
    hosts = LOOPBACK | {settings.host} if local else None
    listening = listen(settings.host, settings.port)
    with listening, owned(settings.folder):
        metrics = Metrics()
        sessions = Sessions(
            session,
            settings.folder,
            memory=settings.sessions,
            disk=int(settings.state_gb * 1e9),
            tell=tell,
        )
        engine = Engine(sessions, metrics, queue=settings.queue, tell=tell, rest=heap.tidy)
        try:
            api = Api(
                engine,
                Served(settings.name, settings.max_tokens, settings.temperature),
                metrics,
                keys=keys,
                limits=Limits(settings.max_request_bytes, BODY_SECONDS, hosts),
                fingerprint=f"pot_{identity(session.manifest)[:12]}",
            )
            heap.settle()
            port = listening.getsockname()[1]
            if not local and not keys:
                tell(
                    f"warning: anybody who reaches {settings.host} may ask; set --api-key-file or "
                    f"{VARIABLE}"
                )
            serve(
                api.app((lambda line: None) if settings.quiet else tell),
                engine,
                listening,
                connections=settings.connections,
                grace=settings.grace,
                ready=lambda: tell(f"{settings.name}: http://{_shown(settings.host)}:{port}/v1"),
            )
        finally:
            engine.close(save=settings.kept)


def is_loopback(host: str) -> bool:
    """Whether nobody else's machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
