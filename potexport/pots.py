"""`--pot-shape`: from what a person asks for to the slots of each layer."""

from __future__ import annotations

import json
from pathlib import Path

from potexport.errors import PotexportError
from potexport.geometry import PotGeometry, pyramid


def shape(asked: str | None, pot: PotGeometry, layers: int) -> tuple[int, ...]:
    """The slots of each layer; empty where all have `pot.slots`.

    asked: "uniform", "pyramid", or a JSON file with a list of a number for each layer.
    Raises PotexportError for a file that holds anything else.
    """
    if asked in (None, "uniform"):
        return ()
    if asked == "pyramid":
        return pyramid(pot.slots, pot.keep, pot.sink + pot.recent, layers)
    assert asked is not None
    try:
        found = json.loads(Path(asked).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PotexportError(
            f"--pot-shape is {asked!r}, neither uniform nor pyramid nor a readable JSON file "
            f"({error})"
        ) from error
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise PotexportError(f"{asked} must hold a list of whole numbers, the slots of each layer")
    if len(found) != layers:
        raise PotexportError(
            f"{asked} has {len(found)} numbers; the model has {layers} layers, each with one"
        )
    return () if set(found) == {pot.slots} else tuple(found)
