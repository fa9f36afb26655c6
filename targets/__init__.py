"""What a target wants of the graphs, one small file each; imported only when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from potexport import plugins
from potexport.errors import PotexportError

# One file a target, in the folder of the runtime that its bundles are for.
PACKAGES = {"onnxruntime": "potexport.targets", "executorch": "potexport.targets.executorch"}


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
class Delegate:
    """What ExecuTorch hands the graphs to.

    name: as its runtime registers it. partitioners: of one method, given the chip if the target has
        any. compresses: whether it takes of the compression too, which otherwise stays with
        ExecuTorch's own kernels.
    rewrites: what it takes only in another form, by name (`rewrites_executorch`).
    lacks: what this machine lacks to lower for it, as the end of a sentence; None if nothing.
    """

    name: str
    partitioners: Callable[[Soc | None], list[Any]]
    compresses: bool = False
    rewrites: tuple[str, ...] = ()
    lacks: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Target:
    """Where a bundle is to run.

    runtime: the package that runs it there. precisions: what it takes -> the type of the pot.
    proven: how far it was proven on the machine that builds: "executed here", "compiled here" or
    "not here"; note: by what, and what never was.
    slots, chunk: of a pot if nobody asks for other sizes, None for what suits the model.
    in_place: its runtime writes outputs into the memory of inputs, so that the pot need not be
        copied (`spec.Layout`).
    fused: its kernels have ONNX Runtime's own operators, also where the pot is not in place.
    compiler: the module of potexport that compiles the graphs once they are written; package: what
        it imports, and extra: the extra of potexport that installs that. socs: the chips that it
        compiles for, of which a person names some.
    """

    name: str
    summary: str
    runtime: str
    precisions: Mapping[str, str]
    default_precision: str
    proven: str
    note: str
    slots: int | None = None
    chunk: int | None = None
    lowest_opset: int = 18
    in_place: bool = False
    fused: bool = False
    compiler: str | None = None
    package: str | None = None
    extra: str | None = None
    socs: tuple[Soc, ...] = ()
    delegate: Delegate | None = None

    @property
    def state(self) -> str:
        """`proven`, or what is missing here to see it."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not here: needs potexport[{self.extra}]"
        return self.proven

    def to_json(self) -> dict[str, object]:
        hidden = ("delegate", "precisions", "socs")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        return {
            **plain,
            "precisions": list(self.precisions),
            "socs": [asdict(soc) for soc in self.socs],
            "delegate": self.delegate and self.delegate.name,
            "state": self.state,
        }

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


def load(name: str, runtime: str | None = None) -> Target:
    """A target by name, or a PotexportError that lists them all.

    runtime: a key of PACKAGES; by default the first that has a target of this name.
    """
    if runtime is None:
        runtime = next((each for each in PACKAGES if name in names(each)), "onnxruntime")
        if name not in names(runtime):
            known = ", ".join(dict.fromkeys(each for kind in PACKAGES for each in names(kind)))
            raise PotexportError(f"there is no {name!r} among the targets; choose one of: {known}")
    if name not in names(runtime):
        raise PotexportError(
            f"there is no target {name!r} for {runtime}; choose one of: {', '.join(names(runtime))}"
        )
    target = plugins.load(PACKAGES[runtime], name).TARGET
    assert isinstance(target, Target)
    return target


def names(runtime: str) -> list[str]:
    """The targets of a runtime, in alphabetical order."""
    return plugins.names(PACKAGES[runtime])


def every() -> list[Target]:
    """All targets of all runtimes."""
    return [load(name, runtime) for runtime in PACKAGES for name in names(runtime)]
