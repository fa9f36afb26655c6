"""Programs that a user would pick instead, each driven as its own documentation drives it.

One file a peer, found by its name as policies and targets are (`potexport.plugins`); each has a
`PEER`. A peer is prepared once (what it builds stays in the cache folder), then opened in a process
of its own, where it is a `Reader` like our own session. All get the same token ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from potexport import plugins
from potexport.benching.forms import Forms
from potexport.errors import PotexportError
from potexport.runtime.ids import Ids

PACKAGE = "potexport.peers"


class Reader(Protocol):
    """A model, and a cache or a pot that holds what it has read."""

    def read(self, ids: Ids) -> None:
        """Read (n,) tokens behind those read before."""

    def following(self) -> int:
        """The likeliest token after all that was read."""

    def step(self, token: int) -> int:
        """Read one token, and say the likeliest one after it."""

    def mark(self) -> None:
        """Remember what was read."""

    def back(self) -> None:
        """Forget what was read after the mark."""

    def reset(self) -> None:
        """Forget all."""


@dataclass(frozen=True)
class Prepared:
    """A model in a peer's own form.

    path: of the file or folder that is opened. precision: of its weights, in words. weights: bytes
    of them that one generated token reads; size: of all, on disk. cache: bytes of its cache for
    each token read, `copies` of which are there at a time. work: floating-point operations of the
    products with weights, for each token of a prompt, the head's aside. build_seconds: of its own
    builder, when it ran; None where it needs none. note: what was changed so that it could be
    measured.
    """

    path: Path
    precision: str
    weights: int
    size: int
    cache: int
    work: int
    copies: int = 1
    build_seconds: float | None = None
    note: str = ""


class Peer(Protocol):
    """A program to measure against. package: of pip. module: what is imported before the clock
    starts."""

    @property
    def package(self) -> str: ...
    @property
    def module(self) -> str: ...

    def prepare(self, forms: Forms, *, context: int) -> Prepared:
        """Bring the model into the peer's form, for so many tokens in its cache; quick if that was
        done before. PotexportError if it cannot be."""

    def open(self, prepared: Prepared, *, threads: int, context: int) -> Reader:
        """Load it."""


def names() -> list[str]:
    """Every peer there is, installed or not."""
    return plugins.names(PACKAGE)


def load(name: str) -> Peer:
    """One peer by its name; PotexportError lists them all if there is none of that name."""
    if name not in names():
        raise PotexportError(
            f"there is no {name!r} among the peers; choose one of: {', '.join(names())}, all"
        )
    found: Any = plugins.load(PACKAGE, name)
    peer: Peer = found.PEER
    return peer


def version(name: str) -> str | None:
    """Of the installed package; None if there is none."""
    try:
        return metadata.version(load(name).package)
    except metadata.PackageNotFoundError:
        return None


def chosen(asked: Iterable[str]) -> dict[str, bool]:
    """The peers asked for, and whether by name; "all" stands for those that are installed.
    PotexportError for one that is asked for by name and is not."""
    found: dict[str, bool] = {}
    for name in asked:
        if name == "all":
            found = {each: False for each in names() if version(each)} | found
        elif version(name) is None:
            raise PotexportError(
                f"{name} is not installed; install it with: pip install {load(name).package}"
            )
        else:
            found[name] = True
    return found
