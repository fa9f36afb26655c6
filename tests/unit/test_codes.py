"""Codes of keys and values against plain Python, and a coded pot against one of floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potexport.coding import STEP, Coding
from potexport.geometry import ModelFacts, default_geometry
from potexport.graphs import codes as graph_codes
from potexport.runtime import codes
from potexport.runtime.coded_pot import CodedPot, KeyFacts
from potexport.runtime.pot import Pot
from potexport.spec import Layout

NUMBER = st.floats(-100, 100, width=32)
ROW = st.lists(NUMBER, min_size=2, max_size=12).filter(lambda row: len(row) % 2 == 0)
BITS = st.sampled_from([8, 4])
FACTS = ModelFacts("llama", 2, 4, 2, 6, 50, 512)
POSITIONS = 200


@given(ROW, BITS)
def test_a_row_is_divided_by_its_largest_element_and_rounded(row: list[float], bits: int) -> None:
    most = {8: 127, 4: 7}[bits]
    array = np.array([row], np.float32)
    made, scales = codes.quantize(array, bits, axis=1)
    scale = max(max(map(abs, row)) / most, codes.TINY)
    assert scales[0] == pytest.approx(scale, rel=1e-6)
    for element, code in zip(row, made[0].tolist(), strict=True):
        assert abs(code) <= most
        assert abs(code - element / scale) <= 0.5 + 1e-4


@given(ROW, BITS)
def test_coding_again_changes_no_code(row: list[float], bits: int) -> None:
    made, scales = codes.quantize(np.array([row], np.float32), bits, axis=1)
    for _ in range(20):
        again, scales = codes.quantize(codes.dequantize(made, scales, axis=1), bits, axis=1)
        assert np.array_equal(again, made)


@given(st.lists(st.tuples(st.integers(-7, 7), st.integers(-7, 7)), min_size=1, max_size=9))
def test_two_codes_share_a_byte(pairs: list[tuple[int, int]]) -> None:
    row = [low for low, _ in pairs] + [high for _, high in pairs]
    packed = codes.pack(np.array([row], np.int8), 4, axis=1)
    assert packed[0].tolist() == [low + 16 * high for low, high in pairs]
    assert codes.unpack(packed, 4, axis=1)[0].tolist() == row
    floats = graph_codes._unpack(torch.from_numpy(packed).float(), 4, dim=1)
    assert floats[0].tolist() == row


@given(ROW, BITS)
def test_the_graph_codes_as_the_host_does(row: list[float], bits: int) -> None:
    array = np.array([row], np.float32)
    made, scales = codes.quantize(array, bits, axis=1)
    theirs, their_scales = graph_codes._quantize(torch.from_numpy(array), bits, dim=1)
    assert np.array_equal(theirs.numpy(), codes.pack(made, bits, axis=1))
    assert np.array_equal(their_scales.numpy(), scales)


@given(st.integers(0, 300), st.integers(0, 9), st.integers(0, 9), st.integers(1, 100))
def test_few_enough_slots_are_codes(fill: int, sink: int, recent: int, body: int) -> None:
    coding = Coding(8, sink, recent)
    slots = coding.floats + body
    fill = min(fill, slots)
    coded = coding.coded(fill, slots)
    exact = fill - coded  # sinks and the newest
    assert 0 <= coded <= body
    assert exact <= coding.floats
    assert coded == 0 or exact >= sink + recent
    assert coded % STEP == 0 or coded == body


def make(pot_dtype: str) -> tuple[Pot, CodedPot]:
    geometry = default_geometry(
        FACTS, slots=64, chunk=12, sink=3, recent=5, catalyst_width=4, positions=POSITIONS
    )
    plain = Layout(FACTS, geometry, frozenset({"novelty"}))
    layout = Layout(FACTS, geometry, frozenset({"novelty"}), pot_dtype=pot_dtype)
    channels = np.zeros((2, 2, 2, 6), np.float32)
    channels[:, 0], channels[:, 1] = 0.3, np.linspace(0.5, 2.0, 6)
    angles = np.arange(POSITIONS)[:, None] * np.array([1.0, 0.1, 0.01])
    turn = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    return Pot(plain), CodedPot(layout, KeyFacts(channels, turn))


def read(pots: tuple[Pot, CodedPot], count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    keys = [draw.normal(size=(1, 2, 6, 12)).astype(np.float32) for _ in range(2)]
    values = [draw.normal(size=(1, 2, 12, 6)).astype(np.float32) for _ in range(2)]
    for pot in pots:
        pot.append(keys, values, 1.0, count)


COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(COUNTS, st.sampled_from(["int8", "int4"]))
def test_a_coded_pot_holds_what_a_plain_one_holds(counts: list[int], pot_dtype: str) -> None:
    plain, coded = make(pot_dtype)
    for seed, count in enumerate(counts):
        if count <= plain.room:
            read((plain, coded), count, seed)
    fill, step = plain.fill, 1 / {"int8": 127, "int4": 7}[pot_dtype]
    assert (coded.fill, coded.room) == (fill, plain.room)
    assert np.array_equal(coded.positions[0], plain.positions[0])
    assert np.array_equal(coded.novelty[0], plain.novelty[0])
    for layer in range(2):
        wanted = plain.keys[layer][0, :, :, :fill]
        mine = coded.keys_of(layer)
        newest = slice(max(fill - 5, 0), fill)
        for where in (slice(0, 3), newest):  # sinks and the newest: bit for bit
            assert np.array_equal(mine[..., where], wanted[..., where])
            assert np.array_equal(
                coded.values_of(layer)[:, where], plain.values[layer][0, :, :fill][:, where]
            )
        assert np.abs(mine - wanted).max(initial=0) <= 12 * step  # of what is at most 6 spreads
        off = coded.values_of(layer) - plain.values[layer][0, :, :fill]
        assert np.abs(off).max(initial=0) <= 4.5 * step / 2 + 1e-6


@pytest.mark.parametrize("pot_dtype", ["int8", "int4"])
def test_what_was_saved_comes_back(pot_dtype: str) -> None:
    pots = make(pot_dtype)
    for seed in range(4):
        read(pots, 12, seed)
    coded = pots[1]
    saved, before = coded.save(), (coded.keys_of(0), coded.values_of(1))
    read(pots, 7, 9)
    coded.load(saved)
    assert coded.fill == 48
    assert np.array_equal(coded.keys_of(0), before[0])
    assert np.array_equal(coded.values_of(1), before[1])


def test_the_pot_is_smaller_and_the_layout_says_so() -> None:
    facts = ModelFacts("llama", 30, 9, 3, 64, 50, 8192)
    geometry = default_geometry(facts, slots=512)
    sizes: dict[str, Any] = {}
    for pot_dtype in ("fp32", "fp16", "int8", "int4"):
        layout = Layout(facts, geometry, frozenset(), pot_dtype=pot_dtype)
        sizes[pot_dtype] = layout.memory()["pot"]
        if layout.coding:
            known = KeyFacts(
                np.ones((30, 2, 3, 64), np.float32), np.ones((2, 8192, 32), np.float32)
            )
            assert CodedPot(layout, known).bytes == sizes[pot_dtype]
    assert sizes["fp16"] < 0.51 * sizes["fp32"]
    assert sizes["int8"] < 0.34 * sizes["fp32"]
    assert sizes["int4"] < 0.22 * sizes["fp32"]
    assert math.isclose(sizes["fp32"], 30 * 3 * 512 * (2 * 64 * 4 + 4))
