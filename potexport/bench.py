"""`bench`: what bundles cost, side by side.

Absolute speeds on shared machines do not hold from one minute to the next. So all bundles are
loaded first, each in a process of its own, and take turns: A A B B A A B B. What is compared is a
ratio within one run.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

from potexport.errors import PotexportError
from potexport.progress import peak_memory

# How often a turn repeats each step, and how many turns there are.
REPEATS = {"prefill": 3, "decode": 12, "observe": 3, "compress": 2}
ROUNDS = 6
PIECE = 20_000  # characters: the tokenizer needs 200 bytes for each


@dataclass(frozen=True)
class Flat:
    """One long reading: is its end as its beginning? Seconds a chunk are means of a tenth of the
    reading after the first compression; memory is the process's peak, in bytes."""

    tokens: int
    compressions: int
    tokens_per_second: float
    compress_share: float
    first_chunk: float
    last_chunk: float
    first_peak: int | None
    last_peak: int | None


@dataclass
class Costs:
    """One bundle. seconds: median of a step over a half-full pot, by graph. open_seconds: to load
    it. weights, pot, peak: bytes; peak is of the process, with all that Python imports."""

    bundle: str
    runtime: str
    precision: str
    weights: int
    pot: int
    chunk: int
    open_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    read: Flat | None = None

    @property
    def tokens_per_second(self) -> dict[str, float]:
        widths = {"prefill": self.chunk, "decode": 1}
        return {name: width / self.seconds[name] for name, width in widths.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def bench(
    folders: list[Path],
    *,
    read: int = 0,
    text: str = "",
    threads: int | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[Costs]:
    """Measure bundles against each other.

    Args:
        read: tokens of `text`, repeated if need be, that each reads besides; 0 for none.
        threads: of each, all that this process may use by default.

    Raises PotexportError for a bundle that cannot be opened.
    """
    if read and not text.strip():
        raise PotexportError("a long reading needs a text; give --text FILE")
    with ExitStack() as stack:
        on_stage("open the bundles")
        workers = [_Worker(stack, folder, threads) for folder in folders]
        found = [worker.ask("costs") for worker in workers]
        for name in REPEATS:
            on_stage(f"steps of {name}")
            times: list[list[float]] = [[] for _ in workers]
            for _ in range(ROUNDS):
                for worker, taken in zip(workers, times, strict=True):
                    taken += worker.ask("step", name)
            for costs, taken in zip(found, times, strict=True):
                costs.seconds |= {name: median(taken)} if taken else {}
        for worker, costs in zip(workers, found, strict=True):
            if read:
                on_stage(f"read {read:,} tokens by {costs.runtime}, {costs.precision}")
                costs.read = worker.ask("read", text, read)
            costs.peak = worker.ask("peak")
    return found


class _Worker:
    """A process that holds one session and answers, one question at a time."""

    def __init__(self, stack: ExitStack, folder: Path, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, folder, threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join, timeout=30)
        stack.callback(self._pipe.close)

    def ask(self, question: str, *arguments: Any) -> Any:
        self._pipe.send((question, *arguments))
        try:
            kind, answer = self._pipe.recv()
        except EOFError as error:
            raise PotexportError(
                f"the process that measures died at {question!r}; it may have had too little memory"
            ) from error
        if kind == "refused":
            raise answer
        return answer


def _serve(pipe: Connection, folder: Path, threads: int | None) -> None:
    """Answer until the other side closes the pipe."""
    held: list[_Held] = []
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if not held:
                held.append(_Held(folder, threads))
            pipe.send(("answer", getattr(held[0], question)(*arguments)))
        except PotexportError as error:
            pipe.send(("refused", error))


class _Held:
    """One bundle's session, and what is asked of it."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        from potexport.runtime.session import Session

        started = perf_counter()
        self.session = Session.open(folder, threads=threads, check=False)
        self.opened, self.folder = perf_counter() - started, folder

    def costs(self) -> Costs:
        manifest, pot = self.session.manifest, self.session.backend.pot
        return Costs(
            bundle=self.folder.name,
            runtime=manifest.runtime,
            precision=manifest.precision,
            weights=manifest.files[manifest.weights].size,
            pot=pot.bytes,
            chunk=manifest.pot.chunk,
            open_seconds=self.opened,
        )

    def step(self, name: str) -> list[float]:
        """Seconds of each of some steps, the first not counted; none where there is no such
        graph."""
        backend, pot = self.session.backend, self.session.manifest.pot
        if name not in self.session.manifest.graphs:
            return []
        half, ids = pot.slots // 2, np.full(pot.chunk + 1, 3, np.int32)
        few = ids[: min(pot.catalyst_width, ids.size)]
        steps: dict[str, Callable[[], Any]] = {
            "prefill": lambda: backend.prefill(ids[:-1], ids[1:], 0.0),
            "decode": lambda: backend.decode(3, 0.0),
            "observe": lambda: backend.observe(few),
            "compress": lambda: backend.compress(pot.keep, reset=False),
        }
        taken = []
        for _ in range(1 + REPEATS[name]):
            backend.pot.fill = pot.slots if name == "compress" else half
            started = perf_counter()
            steps[name]()
            taken.append(perf_counter() - started)
        backend.pot.fill = 0
        return taken[1:]

    def read(self, text: str, tokens: int) -> Flat:
        """Feed so many tokens, chunk by chunk."""
        session = self.session
        session.reset()
        parts = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        once = np.concatenate([session.text.encode(part) for part in parts])
        ids, chunk = np.resize(once, tokens), session.manifest.pot.chunk  # repeated
        first_peak: int | None = None
        begin: int | None = None
        times: list[float] = []
        for first in range(0, tokens, chunk):
            started = perf_counter()
            session.feed(ids[first : first + chunk])
            times.append(perf_counter() - started)
            if begin is None and session.stats.compressions:
                begin, first_peak = len(times), peak_memory()
        if begin is None or len(times) <= begin:
            raise PotexportError(
                f"{tokens} tokens never fill the pot of {session.manifest.pot.slots} slots; read "
                "more"
            )
        stats, after = session.stats, times[begin:]
        tenth = max(1, len(after) // 10)
        busy = stats.read_seconds + stats.compress_seconds
        return Flat(
            tokens=stats.tokens_read,
            compressions=stats.compressions,
            tokens_per_second=stats.read_speed,
            compress_share=stats.compress_seconds / busy,
            first_chunk=mean(after[:tenth]),
            last_chunk=mean(after[-tenth:]),
            first_peak=first_peak,
            last_peak=peak_memory(),
        )

    def peak(self) -> int | None:
        return peak_memory()
