"""Qualcomm's chips, as its HTP compiler numbers them; shared by the targets that hold one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from potexport.errors import PotexportError


@dataclass(frozen=True)
class Soc:
    """One chip. htp_arch: the version of its Hexagon tensor processor; soc_model: QNN's number."""

    name: str
    chip: str
    htp_arch: int
    soc_model: int


def choose(socs: Sequence[Soc], name: str) -> Soc:
    """A chip by its name, in any case; PotexportError lists them all if there is none."""
    for soc in socs:
        if soc.name == name.lower():
            return soc
    known = ", ".join(f"{soc.name} ({soc.chip})" for soc in socs)
    raise PotexportError(f"there is no {name!r} among the chips of this target; choose: {known}")
