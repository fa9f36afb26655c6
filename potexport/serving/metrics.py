"""What a server counts, in the text format of Prometheus. Nothing in it tells what was said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Names begin with `potexport_`, but for those of the process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        made: Any = {"namespace": "potexport", "registry": registry}
        self.requests = Counter("requests", "Requests answered", ["status"], **made)
        self.turns = Counter(
            "turns", "Chat turns computed, by where they went on from", ["origin"], **made
        )
        self.left = Counter("left", "Answers that nobody waited for", **made)
        self.read = Counter("tokens_read", "Tokens read", **made)
        self.generated = Counter("tokens_generated", "Tokens generated", **made)
        self.compressions = Counter("compressions", "Compressions of the pot", **made)
        self.waited = Histogram(
            "wait_seconds", "From a request to its first graph", buckets=SECONDS, **made
        )
        self.computed = Histogram("turn_seconds", "Of computing a turn", buckets=SECONDS, **made)

    def watch(
        self,
        *,
        waiting: Callable[[], float],
        running: Callable[[], float],
        in_memory: Callable[[], float],
        on_disk: Callable[[], float],
    ) -> None:
        """Numbers that are looked up whenever they are asked for."""
        made: Any = {"namespace": "potexport", "registry": self._registry}
        Gauge("queue_length", "Requests that wait", **made).set_function(waiting)
        Gauge("running", "Requests that are computed", **made).set_function(running)
        held = Gauge("sessions", "Ends of turns that are held", ["where"], **made)
        held.labels("memory").set_function(in_memory)
        held.labels("disk").set_function(on_disk)

    def text(self) -> bytes:
        return generate_latest(self._registry)
