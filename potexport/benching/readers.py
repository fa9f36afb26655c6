"""What runs inside the processes: a reader, with its times taken beside it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from potexport import bundle, peers
from potexport.benching.forms import Forms
from potexport.benching.ours import Ours
from potexport.geometry import ModelFacts
from potexport.peers import Prepared, Reader
from potexport.progress import peak_memory
from potexport.runtime.ids import Ids
from potexport.runtime.quiet import quietly

WARM = 2  # first steps of a turn, not counted: caches and threads are another's


class Held:
    """A reader, opened."""

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        started = perf_counter()
        self.reader = open_reader()
        self.opened = perf_counter() - started

    def open_seconds(self) -> float:
        return self.opened

    def prompt(self, ids: Ids) -> float:
        """Seconds to read a prompt from nothing and say its next token; decoding begins there."""
        self.reader.reset()
        started = perf_counter()
        self.reader.read(ids)
        self.reader.following()
        seconds = perf_counter() - started
        self.reader.mark()
        return seconds

    def read(self, ids: Ids) -> float:
        """Seconds to read more."""
        started = perf_counter()
        self.reader.read(ids)
        return perf_counter() - started

    def ready(self) -> float:
        """Seconds until the next token is known; decoding begins behind it."""
        started = perf_counter()
        self.reader.following()
        seconds = perf_counter() - started
        self.reader.mark()
        return seconds

    def decode(self, tokens: Sequence[int], longest: float) -> list[float]:
        """Seconds of each of these steps, or of as many as `longest` seconds allow, the first ones
        not counted; then forget them."""
        times: list[float] = []
        begun = perf_counter()
        for number, token in enumerate(tokens):
            started = perf_counter()
            self.reader.step(token)
            times.append(perf_counter() - started)
            if number > WARM and perf_counter() - begun > longest:
                break
        self.reader.back()
        return times[WARM:] or times

    def following(self, ids: Ids) -> int:
        """The likeliest token after these, read from nothing."""
        self.reader.reset()
        self.reader.read(ids)
        return self.reader.following()

    def reset(self) -> None:
        self.reader.reset()

    def peak(self) -> int | None:
        return peak_memory()


class HeldBundle(Held):
    """A bundle, and what only a bundle has."""

    def __init__(self, folder: Path, threads: int) -> None:
        runtime = bundle.read(folder).runtime
        backend: Any = importlib.import_module(f"potexport.runtime.{runtime}_backend")
        if runtime == "executorch":
            backend.binding()  # imports torch
        super().__init__(lambda: Ours(folder, threads))

    @property
    def _ours(self) -> Ours:
        assert isinstance(self.reader, Ours)
        return self.reader

    def graph(self, name: str) -> list[float]:
        return self._ours.graph(name)

    def compressions(self) -> int:
        return self._ours.session.stats.compressions

    def compressing(self) -> float | None:
        """The share of the reading time that compressions took."""
        stats = self._ours.session.stats
        busy = stats.read_seconds + stats.compress_seconds
        return stats.compress_seconds / busy if busy else None


class HeldPeer(Held):
    def __init__(self, name: str, prepared: Prepared, threads: int, context: int) -> None:
        peer = peers.load(name)
        with quietly():
            importlib.import_module(peer.module)
            super().__init__(lambda: peer.open(prepared, threads=threads, context=context))


class Preparing:
    """Prepares peers in a process of its own, for it takes torch and the whole model."""

    def __init__(self, model: str, cache: Path, facts: ModelFacts) -> None:
        self.forms = Forms(model, cache, facts)

    def prepare(self, name: str, context: int) -> Prepared:
        with quietly():
            return peers.load(name).prepare(self.forms, context=context)
