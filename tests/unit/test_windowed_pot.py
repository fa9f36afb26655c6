"""Layers with a window in a pot, against a plain list of all that was ever read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry, default_geometry
from potexport.runtime.backend import kept_counts, moved_back
from potexport.runtime.pot import Pot
from potexport.spec import Layout

FACTS = ModelFacts("tiny", 3, 2, 1, 2, 300, 1000)
POT = PotGeometry(20, 4, 8, 16, 3, 1, 2, positions=60, windows=(5, 0, 6))
LAYOUT = Layout(FACTS, POT, frozenset({"novelty"}))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.booleans())
@settings(max_examples=80, deadline=None)
def test_it_holds_the_last_tokens_in_their_order(counts: list[int], reset: bool) -> None:
    pot, read = Pot(LAYOUT), 0
    for count in counts:
        if count > pot.room:
            before = pot.position
            kept = kept_counts(pot, POT, POT.keep)
            assert kept.tolist() == [pot.filled(0), POT.keep, pot.filled(2)]
            back = moved_back(pot, kept, reset=reset)
            slots = np.arange(POT.keep_max, dtype=np.int32)[None]
            rows = np.zeros((1, 1, 2, POT.keep_max), np.float32)
            last = [pot.keys[layer] for layer in (0, 2)]
            pot.replace([rows], [rows.transpose(0, 1, 3, 2)], [slots], kept, reset=reset, last=last)
            assert before - back == pot.position
        numbers = np.arange(read, read + 4, dtype=np.float32)
        keys = np.broadcast_to(numbers, (1, 1, 2, 4))
        pot.append([keys] * 3, [keys.transpose(0, 1, 3, 2)] * 3, 0.0, count)
        read += count
        for layer in (0, 2):
            fill = pot.filled(layer)
            seen = min(read, POT.window_kept(layer))
            assert seen <= fill <= POT.slots_of(layer)
            wanted = np.arange(read - fill, read)
            assert np.array_equal(pot.keys[layer][0, 0, 0, :fill], wanted)
            assert np.array_equal(pot.values[layer][0, 0, :fill, 1], wanted)
    assert pot.fill <= POT.slots


def test_a_policy_sees_the_other_layers_alone() -> None:
    graphs = LAYOUT.graphs()
    given = {spec.name: spec.shape for spec in graphs["compress"].inputs}
    assert "novelty.1" in given
    assert not {"novelty.0", "positions.0", "past_key_values.0.value"} & set(given)
    assert given["past_key_values.0.key"] == (1, 1, 2, 5 + 3 + 4)
    made = [spec.name for spec in graphs["compress"].outputs]
    assert made == [
        "present.1.key", "present.1.value", "present.0.key", "present.2.key", "kept.1"
    ]  # fmt: skip


def test_defaults_go_by_the_windows() -> None:
    def of(windows: tuple[int, ...], positions: int | None = None) -> PotGeometry:
        facts = replace(FACTS, max_positions=8192)
        return default_geometry(facts, windows=windows, positions=positions)

    assert of((512, 0, 512)).windows == (512, 0, 512)
    assert of((512, 0, 512)).positions == 4096
    every = of((4096, 4096, 4096))  # hides nothing among 4,096 positions
    assert (every.positions, every.windows) == (4096, ())
    assert of((1500, 1500, 1500)).positions == 1500
    with pytest.raises(PotexportError, match="every layer looks back only 1500 tokens"):
        of((1500, 1500, 1500), positions=2000)
    with pytest.raises(PotexportError, match="omit it"):
        default_geometry(
            replace(FACTS, max_positions=8192),
            slots=512,
            layer_slots=(600, 512, 424),
            windows=(512, 0, 512),
        )


def test_positions_end_where_frequencies_change() -> None:
    facts = replace(FACTS, max_positions=8192)
    assert default_geometry(facts, slots=512, most_positions=1024).positions == 1024
    with pytest.raises(PotexportError, match="beyond 1024 the model turns keys by other"):
        default_geometry(facts, slots=512, positions=1025, most_positions=1024)
