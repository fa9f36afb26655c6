"""What a target wants of the graphs, one small file each; imported only when asked for."""

from __future__ import annotations

from dataclasses import dataclass

from potexport import plugins

PACKAGE = "potexport.targets"


@dataclass(frozen=True)
class Target:
    """Where a bundle is to run.

    precisions: what it takes, best first. proven: how far it was proven on the machine that builds:
    "executed here", "compiled here" or "exported only".
    """

    name: str
    summary: str
    runtime: str
    precisions: tuple[str, ...]
    default_precision: str
    proven: str


def load(name: str) -> Target:
    """A target by name, or a PotexportError that lists them all."""
    target = plugins.load(PACKAGE, name).TARGET
    assert isinstance(target, Target)
    return target


def names() -> list[str]:
    return plugins.names(PACKAGE)
