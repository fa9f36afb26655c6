"""Sizes of pots and of their layers: which numbers can work together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potexport import pots
from potexport.errors import PotexportError
from potexport.geometry import PotGeometry, pyramid

POT = PotGeometry(48, 8, 23, 37, 8, 2, 3, positions=150)


def test_shapes_by_name() -> None:
    assert pots.shape(None, POT, 3) == pots.shape("uniform", POT, 3) == ()
    assert pots.shape("pyramid", POT, 3) == (59, 48, 37)
    assert pots.shape("pyramid", POT, 1) == ()


def test_a_shape_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    path.write_text("[41, 60, 43]")
    assert pots.shape(str(path), POT, 3) == (41, 60, 43)
    path.write_text("[48, 48, 48]")
    assert pots.shape(str(path), POT, 3) == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "neither uniform nor pyramid nor a readable JSON file"),
        ("[41, 60", "neither uniform nor pyramid nor a readable JSON file"),
        ("[" * 100_000, "neither uniform nor pyramid nor a readable JSON file"),
        ("\udcff", "neither uniform nor pyramid nor a readable JSON file"),
        ('{"layers": 3}', "must hold a list of whole numbers"),
        ("[41, 60, 43.0]", "must hold a list of whole numbers"),
        ("[41, 60, true]", "must hold a list of whole numbers"),
        ("[41, 60]", "has 2 numbers; the model has 3 layers"),
    ],
)
def test_a_file_that_is_no_shape_is_one_line(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "shape.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PotexportError, match=says) as caught:
        pots.shape(str(path), POT, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_slots": (41, 60, 44)}, r"have 145 slots together; 3 layers with --pot 48"),
        (
            {"layer_slots": (24, 60, 60)},
            r"24 slots and would keep -1, fewer than sinks .*\(5\)",
        ),
        ({"layer_slots": (-10, 77, 77)}, "fewer than sinks"),
        ({"positions": 55}, "--positions is 55; .* need at least 56"),
        ({"positions": 1 << 21}, "it may be at most"),
        ({"keep": 4}, r"between sinks \+ recent \(5\)"),
        ({"slots": 40000, "positions": 50000}, "--pot is 40000; it may be at most"),
    ],
)
def test_numbers_that_cannot_work_are_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PotexportError, match=says) as caught:
        replace(POT, **changes).check()
    assert "\n" not in str(caught.value)


def test_a_large_layer_takes_more_positions() -> None:
    """After a reset the next token stands behind the fullest layer."""
    shaped = replace(POT, layer_slots=(41, 60, 43), positions=60 + 8)
    shaped.check()
    with pytest.raises(PotexportError, match=r"--positions is 67; .* at least 68"):
        replace(shaped, positions=67).check()


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 8), st.integers(0, 40), st.data())
def test_a_pyramid_has_the_same_memory_and_can_work(
    layers: int, chunk: int, forced: int, more: int, data: st.DataObject
) -> None:
    keep = max(1, forced + more)
    slots = keep + chunk + data.draw(st.integers(0, 30))
    keep_max = data.draw(st.integers(keep, slots - chunk))
    shape = pyramid(slots, keep, forced, layers)
    assert sum(shape) == slots * layers
    assert shape[0] >= shape[-1]
    sink = data.draw(st.integers(0, forced))
    pot = PotGeometry(slots, chunk, keep, keep_max, 8, sink, forced - sink, 1 << 12, shape)
    pot.check()
    for layer in range(layers):
        assert pot.keep_max_of(layer) + chunk <= pot.slots_of(layer)
        assert pot.keep + pot.more(layer) >= forced


def test_the_sizes_of_layers_are_kept_in_the_manifest() -> None:
    shaped = replace(POT, layer_slots=(41, 60, 43))
    fields = json.loads(json.dumps(shaped.__dict__))
    again = PotGeometry(**{**fields, "layer_slots": tuple(fields["layer_slots"]), "windows": ()})
    assert again == shaped
    assert (again.shaped, again.smallest) == (True, -7)
