"""How keys turn, found from keys alone; and the one order of a pot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs import turns
from potexport.graphs.attention import mask
from potexport.graphs.rope import turn_back
from potexport.graphs.turns import half_apart, in_order, neighbours

POSITIONS = 40


def table(pairs: int, *, twice: str = "behind", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, R) as rotary modules give them."""
    speed = 0.9 ** torch.arange(pairs)
    angle = torch.arange(POSITIONS)[:, None] * speed
    if twice == "behind":
        angle = torch.cat([angle, angle], dim=-1)
    elif twice == "beside":
        angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos() * scale, angle.sin() * scale


def rotated(key: Tensor, position: int, *, pairs: int, beside: bool) -> Tensor:
    """By complex numbers: key (H, D), of which 2 * pairs elements turn."""
    angle = position * 0.9 ** torch.arange(pairs)
    turned = key.clone()
    first = slice(0, 2 * pairs, 2) if beside else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if beside else slice(pairs, 2 * pairs)
    made = torch.complex(key[:, first], key[:, second]) * torch.exp(1j * angle)
    turned[:, first], turned[:, second] = made.real, made.imag
    return turned


def measured(near: list[Tensor], far: list[Tensor], tables: Any) -> turns.Turns:
    return turns.measure(near, far, tables, distance=POSITIONS - 1, within=1e-3, model_type="mine")


@pytest.mark.parametrize("twice", ["behind", "beside", "once"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("pairs", "size"), [(5, 10), (3, 10), (1, 12)])
def test_a_turn_is_found_whatever_its_table_looks_like(
    pairs: int, size: int, beside: bool, twice: str
) -> None:
    torch.manual_seed(0)
    key = torch.randn(2, size)
    near, far = (rotated(key, n, pairs=pairs, beside=beside) for n in (0, POSITIONS - 1))
    found = measured([near, near], [far, near], [table(pairs, twice=twice, scale=1.3)])
    assert found.of(1) is None  # this one does not turn
    own = found.of(0)
    assert own is not None
    for position in (1, 7, POSITIONS - 1):
        here = rotated(key, position, pairs=pairs, beside=beside)
        order = found.orders[0]
        back = turn_back(in_order(here, order), own[position].expand(2, -1))
        assert torch.allclose(back, in_order(key, order), atol=1e-5)


def test_each_layer_finds_its_own_table() -> None:
    torch.manual_seed(0)
    key, fast, slow = torch.randn(3, 10), table(5), table(5)
    slow = (slow[0][POSITIONS // 2].expand(POSITIONS, -1), slow[1])  # of no layer
    far = rotated(key, POSITIONS - 1, pairs=5, beside=False)
    found = measured([key], [far], [slow, fast])
    assert found.count == 1
    assert found.alike


@pytest.mark.parametrize(
    ("far", "tables", "message"),
    [
        (lambda key: key * 1.1, [table(5)], "layer 0 of mine does not rotate its keys"),
        (lambda key: key * 1.1, [], "mine has no rotary positions"),
        (lambda key: key, [table(5)], "mine has no rotary positions"),
    ],
)
def test_what_turns_in_no_known_way_is_refused(far: Any, tables: Any, message: str) -> None:
    key = torch.ones(2, 10)
    with pytest.raises(PotexportError, match=message):
        measured([key], [far(key)], tables)


@pytest.mark.parametrize("order", [half_apart(3, 10), neighbours(3, 10), neighbours(5, 10), ()])
def test_an_order_has_each_element_once(order: turns.Order) -> None:
    elements = in_order(torch.arange(10), order).tolist()
    assert sorted(elements) == list(range(10))


@given(
    st.integers(1, 9), st.integers(0, 12), st.integers(1, 6), st.integers(1, 30), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_a_window_hides_by_age(slots: int, fill: int, width: int, window: int, group: int) -> None:
    fill = min(fill, slots)
    made = mask(
        torch.tensor([fill], dtype=torch.int32),
        slots=slots,
        width=width,
        group=group,
        dtype=torch.float32,
        window=window,
    )
    for row, query in enumerate([*range(width)] * group):
        ages = [query + fill - slot for slot in range(slots)]
        seen = [slot < fill and ages[slot] < window for slot in range(slots)]
        seen += [new <= query and query - new < window for new in range(width)]
        assert np.array_equal(made[row].numpy() == 0, seen)
