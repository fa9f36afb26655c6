"""The whole run: who takes part, at which amounts of text, and what is measured besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from potexport import bundle, peers
from potexport.benching import ours, yardsticks
from potexport.benching.figures import Figures, Party, Spread
from potexport.benching.long import read_long
from potexport.benching.readers import HeldBundle, HeldPeer, Preparing
from potexport.benching.turns import Entry, Turns
from potexport.benching.workers import Worker, WorkerError
from potexport.errors import PotexportError
from potexport.peers import Prepared
from potexport.runtime.ids import Ids
from potexport.runtime.text import Text

CONTEXTS = (1_000, 8_000, 32_000, 100_000)
OPENINGS = 3  # of each party, at the first amount of text
GRAPHS = ("prefill", "decode", "observe", "compress")
BLOCK = 20_000  # characters: the tokenizer needs 200 bytes for each
FIRST_ID = 3  # of random tokens; those before it are special ones in most vocabularies
Stage = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """bundles: of one model. peers: by name, and whether the run may not go on without it. model:
    what the bundles were built from, for peers. cache: where peers keep what they build. contexts:
    amounts of text read. read: tokens of one long reading of each bundle besides; 0 for none. text:
    repeated if it is short; random tokens without. rounds: turns of each. patience: seconds that a
    peer may read at one amount of text."""

    bundles: tuple[Path, ...]
    peers: Mapping[str, bool] = field(default_factory=dict)
    model: str | None = None
    cache: Path = Path(".cache")
    contexts: tuple[int, ...] = CONTEXTS
    read: int = 0
    text: str = ""
    threads: int = 1
    rounds: int = 5
    patience: float = 300.0


def bench(settings: Settings, *, on_stage: Stage = lambda _: None) -> Figures:
    """Measure bundles and peers against each other.

    Raises PotexportError for a bundle that cannot be opened, and for a peer that cannot take the
    model; a peer that fails later is noted, and the others go on.
    """
    bundles = [_bundle(folder, settings.threads) for folder in settings.bundles]
    ids = tokens(settings)
    others, left_out = _peers(settings, on_stage)
    entries = [*bundles, *others]
    openings = min(OPENINGS, settings.rounds)
    copies, products = list[float](), list[float]()
    on_stage("the machine itself")
    with Worker(yardsticks.Yardsticks, settings.threads, threads=settings.threads) as machine:
        facts = machine.ask("facts")
        for number, context in enumerate(sorted(settings.contexts)):
            turns = Turns(entries, ids[:context], machine, rounds=settings.rounds)
            turns.measure(openings=1 if number else openings, on_stage=on_stage)
            copies, products = copies + turns.copies, products + turns.products
    _graphs(bundles, settings, on_stage)
    for entry, folder in zip(bundles, settings.bundles, strict=True):
        if settings.read:
            on_stage(f"read {settings.read:,} tokens by {entry.party.name}")
            pot = bundle.read(folder).pot
            entry.party.long = read_long(partial(entry.open, 0), pot, ids[: settings.read])
    return Figures(
        threads=settings.threads,
        machine=yardsticks.machine(),
        yardsticks=facts,
        copy=Spread.some(copies),
        products=Spread.some(products),
        parties=[entry.party for entry in entries],
        left_out=left_out,
    )


def tokens(settings: Settings) -> Ids:
    """The same for all, as many as the longest reading takes."""
    count = max(*settings.contexts, settings.read)
    folder = settings.bundles[0]
    if not settings.text.strip():
        vocabulary = bundle.read(folder).model.vocab_size
        return np.random.default_rng(0).integers(FIRST_ID, vocabulary, count).astype(np.int32)
    text, whole = Text.open(str(folder)), settings.text
    parts = [text.encode(whole[at : at + BLOCK]) for at in range(0, len(whole), BLOCK)]
    return np.resize(np.concatenate(parts), count)


def _bundle(folder: Path, threads: int) -> Entry:
    def make(_: int) -> Worker:
        return Worker(HeldBundle, folder, threads, threads=threads)

    return Entry(ours.party(folder), make)


def _peers(settings: Settings, on_stage: Stage) -> tuple[list[Entry], dict[str, str]]:
    """Each prepared for every amount of text; and why some cannot be."""
    if not settings.peers:
        return [], {}
    if settings.model is None:
        raise PotexportError(
            "peers need what the bundles were built from; give --model, a .gguf file or a folder"
        )
    found, left_out = list[Entry](), dict[str, str]()
    forms = (settings.model, settings.cache, bundle.read(settings.bundles[0]).model)
    with Worker(Preparing, *forms, threads=settings.threads) as worker:
        for name, needed in settings.peers.items():
            on_stage(f"prepare {name}")
            try:
                prepared = {size: worker.ask("prepare", name, size) for size in settings.contexts}
            except (PotexportError, WorkerError) as error:
                if needed:
                    raise PotexportError(f"{name} cannot be measured: {error}") from error
                left_out[name] = str(error)
                continue
            found.append(_peer(name, prepared, settings))
    return found, left_out


def _peer(name: str, prepared: dict[int, Prepared], settings: Settings) -> Entry:
    def make(context: int) -> Worker:
        threads = settings.threads
        return Worker(HeldPeer, name, prepared[context], threads, context, threads=threads)

    last = prepared[max(prepared)]
    party = Party(
        name=name,
        kind="peer",
        version=f"{peers.load(name).package} {peers.version(name)}",
        precision=last.precision,
        weights=last.weights,
        work=last.work,
        size=last.size,
        cache=last.cache,
        build=last.build_seconds,
        note=last.note,
    )
    return Entry(party, make, settings.patience, last.copies)


def _graphs(entries: list[Entry], settings: Settings, on_stage: Stage) -> None:
    """Steps of each graph of each bundle, over a half-full pot."""
    with ExitStack() as stack:
        workers = [stack.enter_context(entry.open(0)) for entry in entries]
        for name in GRAPHS:
            on_stage(f"steps of {name}")
            times: list[list[float]] = [[] for _ in workers]
            for _ in range(settings.rounds):
                for worker, taken in zip(workers, times, strict=True):
                    taken += worker.ask("graph", name)
            for entry, taken in zip(entries, times, strict=True):
                if taken:
                    entry.party.graphs[name] = Spread.some(taken)
