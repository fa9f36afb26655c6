"""A bundle's session as one of the readers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from potexport import bundle
from potexport.benching import accounting
from potexport.benching.figures import Party
from potexport.runtime.ids import Ids
from potexport.runtime.session import Session, State

REPEATS = {"prefill": 3, "decode": 8, "observe": 3, "compress": 2}


class Ours:
    """See `potexport.peers.Reader`. What is read past the pot is compressed, as always."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.session = Session.open(folder, threads=threads, check=False)
        self._marked: State | None = None

    def read(self, ids: Ids) -> None:
        self.session.feed(ids)

    def following(self) -> int:
        return int(self.session.logits().argmax())

    def step(self, token: int) -> int:
        self.session.accept(token)
        return self.following()

    def mark(self) -> None:
        self._marked = self.session.snapshot()

    def back(self) -> None:
        assert self._marked is not None
        self.session.restore(self._marked)

    def reset(self) -> None:
        self.session.reset()

    def graph(self, name: str) -> list[float]:
        """Seconds of each of some steps of one graph over a half-full pot, the first not counted;
        none where there is no such graph. Forgets what was read."""
        backend, pot = self.session.backend, self.session.manifest.pot
        if name not in self.session.manifest.graphs:
            return []
        ids = np.full(pot.chunk + 1, 3, np.int32)
        few = ids[: min(pot.catalyst_width, ids.size)]
        steps: dict[str, Callable[[], Any]] = {
            "prefill": lambda: backend.prefill(ids[:-1], ids[1:], 0.0),
            "decode": lambda: backend.decode(3, 0.0),
            "observe": lambda: backend.observe(few),
            "compress": lambda: backend.compress(pot.keep, reset=False),
        }
        taken = []
        for _ in range(1 + REPEATS[name]):
            backend.pot.fill = pot.slots if name == "compress" else pot.slots // 2
            started = perf_counter()
            steps[name]()
            taken.append(perf_counter() - started)
        self.session.reset()
        return taken[1:]


def party(folder: Path) -> Party:
    """What a bundle's files say; what its graphs would say is None where nobody can look into
    them: in a program for ExecuTorch, or without the package onnx."""
    manifest = bundle.read(folder)
    bundle.check_files(folder, manifest, digests=False)
    weights = work = None
    if manifest.program is None and importlib.util.find_spec("onnx"):
        weights = accounting.read_by_a_token(folder / "decode.onnx")
        work = accounting.products(folder / "prefill.onnx", manifest.pot.chunk)
    return Party(
        name=folder.name,
        kind="bundle",
        version=f"{manifest.runtime} {manifest.tools.get(manifest.runtime, '')}".strip(),
        precision=manifest.precision,
        weights=weights,
        work=work,
        size=manifest.files[manifest.weights].size,
        pot=accounting.pot_bytes(manifest),
        pot_read=accounting.pot_read(manifest),
    )
