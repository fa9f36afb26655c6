"""All parties at one amount of text read: opened, read, decoded, in turns.

Absolute speeds on shared machines do not hold from one minute to the next. So all are opened first,
each in a process of its own, and take turns: A B A B; what is compared is a ratio within those
turns. In each turn the machine itself is measured too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from potexport.benching.figures import Party, Reading, Spread
from potexport.benching.workers import Worker, WorkerError
from potexport.benching.yardsticks import free_memory
from potexport.errors import PotexportError
from potexport.runtime.ids import Ids

SHORT = 2_000  # tokens: a prompt that is read anew in each turn; longer ones are read once
PIECE = 1_000  # tokens of one turn of a long one
STEPS = 14  # of a turn of decoding
LONGEST = 4.0  # seconds of such a turn
ROOM = 0.8  # of the free memory, for all parties together


@dataclass
class Entry:
    """A party, and how its process is made for so many tokens in its cache. patience: seconds that
    it may read; a bundle has no end of it, and may not fail. copies: of its cache, at a time."""

    party: Party
    open: Callable[[int], Worker]
    patience: float | None = None
    copies: int = 1

    def needs(self, tokens: int) -> int:
        """About how many bytes of memory: weights, once more while they are packed, and cache."""
        party = self.party
        return 2 * party.size + party.pot + self.copies * party.cache * tokens


@dataclass
class _Player:
    """An entry at one amount of text, and the seconds that it took for each thing."""

    entry: Entry
    reading: Reading
    worker: Worker | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def stop(self, why: str) -> None:
        """No more of it at this amount of text."""
        if self.entry.patience is None:
            raise PotexportError(f"{self.entry.party.name} cannot be measured: {why}")
        self.reading.stopped = why
        self.close()

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None


class Turns:
    """One amount of text. machine: the process of the yardsticks."""

    def __init__(self, entries: list[Entry], ids: Ids, machine: Worker, *, rounds: int) -> None:
        """ids: all of the text, (n,) int32. rounds: how often each has its turn."""
        self._ids, self._machine, self._rounds = ids, machine, rounds
        self._players = [_Player(entry, Reading(ids.size)) for entry in entries]
        self.copies: list[float] = []
        self.products: list[float] = []

    def measure(self, *, openings: int, on_stage: Callable[[str], None]) -> None:
        """Add a reading to each party. openings: how often each is opened, for the time alone."""
        size = f"{self._ids.size:,} tokens"
        try:
            on_stage(f"{size}: open")
            self._make_room()
            for _ in range(openings):
                for player in self._players:
                    self._open(player)
            on_stage(f"{size}: read")
            self._read_anew() if self._ids.size <= SHORT else self._read_once()
            on_stage(f"{size}: decode")
            self._decode()
        finally:
            for player in self._players:
                player.close()
        for player in self._players:
            self._note(player)

    def _make_room(self) -> None:
        """All are open at once; those whose cache would not fit stay out, the largest first."""
        room = ROOM * free_memory()
        for player in sorted(self._players, key=lambda each: each.entry.needs(self._ids.size)):
            needs = player.entry.needs(self._ids.size)
            if needs > room and player.entry.patience:
                player.stop(f"it needs {needs / 1e9:.1f} GB, and {room / 1e9:.1f} GB are left")
            else:
                room -= needs

    def _open(self, player: _Player) -> None:
        player.close()
        entry = player.entry
        if player.reading.stopped:
            return
        before = entry.party.readings[-1] if entry.party.readings else None
        if before and entry.patience and (why := _hopeless(before, self._ids.size, entry.patience)):
            return player.stop(why)
        try:
            player.worker = entry.open(self._ids.size)
            player.seconds["open"].append(player.worker.ask("open_seconds"))
        except WorkerError as error:
            player.stop(str(error))

    def _each(self, action: Callable[[_Player, Worker], None]) -> None:
        """One turn of all that are still there."""
        for player in self._players:
            if player.worker:
                try:
                    action(player, player.worker)
                except WorkerError as error:
                    player.stop(str(error))

    def _read_anew(self) -> None:
        """A whole prompt in each turn; the first, when libraries get ready, does not count."""

        def prompt(player: _Player, worker: Worker) -> None:
            player.seconds["prompt"].append(worker.ask("prompt", self._ids))

        for _ in range(1 + self._rounds):
            self._each(prompt)
            self._measure_machine()
        for player in self._players:
            del player.seconds["prompt"][:1]
            if taken := player.seconds["prompt"]:
                mean = sum(taken) / len(taken) / self._ids.size
                player.reading.curve.append((self._ids.size, mean))

    def _read_once(self) -> None:
        """Piece by piece, each in turn, until the end or the end of patience."""
        for first in range(0, self._ids.size, PIECE):
            piece = self._ids[first : first + PIECE]

            def read(
                player: _Player, worker: Worker, piece: Ids = piece, first: int = first
            ) -> None:
                seconds = worker.ask("read", piece)
                player.seconds["pieces"].append(seconds)
                player.reading.curve.append((first + piece.size, seconds / piece.size))
                total, patience = sum(player.seconds["pieces"]), player.entry.patience
                if patience and total > patience and first + piece.size < self._ids.size:
                    player.stop(f"{first + piece.size:,} tokens took {total:,.0f} s")

            self._each(read)
        self._each(self._ready)
        self._measure_machine()

    @staticmethod
    def _ready(player: _Player, worker: Worker) -> None:
        total = sum(player.seconds["pieces"]) + worker.ask("ready")
        player.seconds["prompt"].append(total)

    def _decode(self) -> None:
        ids = [int(token) for token in self._ids[:STEPS]]

        def steps(player: _Player, worker: Worker) -> None:
            player.seconds["decode"] += worker.ask("decode", ids, LONGEST)

        for _ in range(self._rounds):
            self._each(steps)
            self._measure_machine()

        def end(player: _Player, worker: Worker) -> None:
            player.reading.peak = worker.ask("peak")
            if player.entry.party.kind == "bundle":
                player.reading.compressing = worker.ask("compressing")

        self._each(end)

    def _measure_machine(self) -> None:
        copy, products = self._machine.ask("both")
        self.copies.append(copy)
        self.products.append(products)

    def _note(self, player: _Player) -> None:
        reading, seconds = player.reading, player.seconds
        reading.open = Spread.of(seconds["open"])
        reading.prompt, reading.decode = Spread.of(seconds["prompt"]), Spread.of(seconds["decode"])
        reading.copy, reading.products = Spread.of(self.copies), Spread.of(self.products)
        player.entry.party.readings.append(reading)


def _hopeless(before: Reading, tokens: int, patience: float) -> str:
    """Why not to begin: a token costs at least what it cost with less text before it."""
    if before.stopped:
        return f"stopped at {before.tokens:,}: {before.stopped}"
    least = before.prompt.median / before.tokens * tokens if before.prompt else 0.0
    return f"it would read for more than {least:,.0f} s" if least > patience else ""
