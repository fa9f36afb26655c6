"""What conversations have read: pots in memory, then on disk, found by what was said.

One session computes. What it holds at the end of a turn is copied, 10 to 30 ms for a full pot, and
no copy is ever written to: a turn that fails, or two that go on from the same one, harm nothing.
A copy that a later turn went on from is kept as long as there is room, for a request that asks the
same again; it is never written to disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potexport.errors import PotexportError
from potexport.runtime.records import State
from potexport.runtime.session import Session

Origin = Literal["new", "memory", "disk"]
NAME = re.compile(r"[0-9a-f]{64}\.pot")
LEFT = re.compile(r"\.[0-9a-f]{64}\.pot\.saving-.*")  # by a save that was killed


@dataclass
class _Held:
    """Of one turn's end. state: None where it is on disk alone. size: of its file, 0 without one.
    passed: a later turn went on from here."""

    key: str
    parent: str | None
    state: State | None
    size: int = 0
    passed: bool = False


class Sessions:
    """At most `memory` pots in memory and `disk` bytes in `folder`; for one thread."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        *,
        memory: int,
        disk: int,
        tell: Callable[[str], None],
    ) -> None:
        """folder: exists (`owning`); sessions of an earlier server in it go on, a file of another
        kind is left alone. tell: takes a line about what could not be kept."""
        self.session = session
        self._folder, self._memory, self._disk, self._tell = folder, memory, disk, tell
        self._keep, self._share = session.keep, session.keep_mass
        self._held: dict[str, _Held] = {}  # the longest unused first
        self._newest: _Held | None = None
        self._scan()

    def _scan(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if LEFT.fullmatch(path.name):
                path.unlink(missing_ok=True)
            elif NAME.fullmatch(path.name):
                facts = path.stat()
                found.append((facts.st_mtime, path.stem, facts.st_size))
        for _, key, size in sorted(found):
            self._held[key] = _Held(key, None, None, size)
        self._bound_disk()

    @property
    def in_memory(self) -> int:
        return sum(each.state is not None for each in list(self._held.values()))

    @property
    def on_disk(self) -> int:
        return sum(each.size > 0 for each in list(self._held.values()))

    def enter(self, keys: Sequence[str]) -> tuple[int, Origin]:
        """Bring into the session what goes furthest of what is held, or nothing.

        keys: of the first 1, 2, … messages. One message at least stays to be read. Returns how many
        are held.
        """
        origin: Origin | None = None
        for count in range(len(keys) - 1, 0, -1):
            held = self._held.get(keys[count - 1])
            origin = self._restored(held) if held else None
            if held and origin:
                self._held[held.key] = self._held.pop(held.key)
                break
        else:
            self.session.reset()
            count, origin = 0, "new"
        self.session.policy = self.session.policy  # the catalyst of another question goes
        return count, origin

    def _restored(self, held: _Held) -> Origin | None:
        if held.state is not None:
            self.session.restore(held.state)
            return "memory"
        try:
            self.session.load(self._path(held.key), policy=self.session.policy)
        except PotexportError as error:
            self._tell(f"a saved conversation cannot be used and is removed: {error}")
            self._remove(held)
            return None
        self.session.keep, self.session.keep_mass = self._keep, self._share
        return "disk"

    def leave(self, key: str, *, parent: str | None) -> None:
        """Hold what is in the session now, which came from `parent`, as `key`."""
        held = _Held(key, parent, self.session.snapshot())
        old = self._held.pop(key, None)
        if old:
            held.size, held.passed = old.size, old.passed
            self._remove_file(held)
        self._held[key] = self._newest = held
        before = self._held.get(parent) if parent else None
        if before:
            before.passed = True
        while self.in_memory > self._memory:
            self._evict(self._oldest(lambda each: each.state is not None))

    def close(self, *, save: bool) -> None:
        """save: also what is in memory, to be found by the next server."""
        for held in list(self._held.values()):
            if save and held.state is not None and not held.passed:
                self._write(held)
        self._held.clear()

    def _oldest(self, fits: Callable[[_Held], bool]) -> _Held:
        """Of those that were passed, if there are any; the newest last, and before it the one that
        it came from, for its question is what is asked again most."""
        newest = self._newest

        def rank(each: _Held) -> int:
            if each is newest:
                return 3
            if newest and each.key == newest.parent:
                return 2
            return 0 if each.passed else 1

        return min((each for each in self._held.values() if fits(each)), key=rank)

    def _evict(self, held: _Held) -> None:
        if not held.passed and not held.size:
            self._write(held)
        held.state = None
        if not held.size:
            del self._held[held.key]

    def _write(self, held: _Held) -> None:
        """The session's own content is lost by it."""
        assert held.state is not None
        path = self._path(held.key)
        self.session.restore(held.state)
        try:
            self.session.save(path)
            held.size = path.stat().st_size
        except (PotexportError, OSError) as error:  # the next turn reads all of it again
            self._tell(f"a conversation could not be kept on disk: {error}")
            return
        before = self._held.get(held.parent) if held.parent else None
        if before and before.size:
            self._remove_file(before)
            if before.state is None:
                del self._held[before.key]
        self._bound_disk()

    def _bound_disk(self) -> None:
        while sum(each.size for each in self._held.values()) > self._disk:
            held = self._oldest(lambda each: each.size > 0)
            self._remove_file(held)
            if held.state is None:
                del self._held[held.key]

    def _remove(self, held: _Held) -> None:
        self._remove_file(held)
        del self._held[held.key]

    def _remove_file(self, held: _Held) -> None:
        held.size = 0
        try:
            os.unlink(self._path(held.key))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._tell(f"a saved conversation could not be removed: {error.strerror}")

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.pot"
