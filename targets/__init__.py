"""What a target wants of the graphs, one small file each; imported only when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from potexport import plugins
from potexport.errors import PotexportError

PACKAGE = "potexport.targets"


@dataclass(frozen=True)
class Soc:
    """One chip, as Qualcomm's compiler numbers it.

    htp_arch: the version of its Hexagon tensor processor. soc_model: QNN's number of the chip.
    """

    name: str
    chip: str
    htp_arch: int
    soc_model: int


@dataclass(frozen=True)
class Target:
    """Where a bundle is to run.

    precisions: what it takes. proven: how far it was proven on the machine that builds: "executed
    here", "compiled here" or "exported only"; note: by what, and what never was.
    slots, chunk: of a pot if nobody asks for other sizes, None for what suits the model.
    compiler: the module of potexport that compiles the graphs once they are written; package: what
        it imports, and extra: the extra of potexport that installs that. socs: the chips that it
        compiles for, of which a person names some.
    """

    name: str
    summary: str
    runtime: str
    precisions: tuple[str, ...]
    default_precision: str
    proven: str
    note: str
    slots: int | None = None
    chunk: int | None = None
    lowest_opset: int = 18
    compiler: str | None = None
    package: str | None = None
    extra: str | None = None
    socs: tuple[Soc, ...] = ()

    @property
    def state(self) -> str:
        """`proven`, or what is missing here to see it."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"exported only: needs potexport[{self.extra}]"
        return self.proven

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "state": self.state}

    def chips(self, names: Sequence[str]) -> tuple[Soc, ...]:
        """The chips of these names, in any case and each once; PotexportError lists those there
        are."""
        known = ", ".join(f"{soc.name} ({soc.chip})" for soc in self.socs)
        if names and not self.socs:
            raise PotexportError(f"target {self.name} takes no --soc: it compiles for no chip")
        if self.socs and not names:
            raise PotexportError(f"target {self.name} compiles for one chip; give --soc: {known}")
        by_name = {soc.name: soc for soc in self.socs}
        wrong = [name for name in names if name.lower() not in by_name]
        if wrong:
            raise PotexportError(
                f"there is no {wrong[0]!r} among the chips of {self.name}; choose: {known}"
            )
        return tuple(by_name[name] for name in dict.fromkeys(name.lower() for name in names))


def load(name: str) -> Target:
    """A target by name, or a PotexportError that lists them all."""
    target = plugins.load(PACKAGE, name).TARGET
    assert isinstance(target, Target)
    return target


def names() -> list[str]:
    return plugins.names(PACKAGE)
