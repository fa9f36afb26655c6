"""Which tokens each head holds, against lists in plain Python; how that comes into the page."""

from __future__ import annotations

import base64
import random
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from potexport.reporting import maps
from potexport.reporting.ledger import NEVER, Array, Ledger, Lives, packed, width


class ByLists:
    """One list of token numbers a head, and a copy of all lists at every step."""

    def __init__(self, heads: list[int]) -> None:
        self.heads = [[list[int]() for _ in range(n)] for n in heads]
        self.states: list[list[list[int]]] = []

    def read(self, first: int, last: int) -> None:
        for head in self.every():
            head += range(first, last)

    def every(self) -> list[list[int]]:
        return [head for layer in self.heads for head in layer]

    def remember(self) -> None:
        self.states.append([list(head) for head in self.every()])

    def compress(self, kept: list[Array]) -> None:
        for layer, slots in zip(self.heads, kept, strict=True):
            for head, mine in zip(layer, slots, strict=True):
                head[:] = [head[slot] for slot in mine]
        self.remember()


@st.composite
def readings(draw: st.DrawFn) -> tuple[list[int], Lives, ByLists]:
    """Any heads, any chunks, any slots kept: of each layer another number, in any order."""
    heads = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    fresh = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    chance = random.Random(draw(st.integers(0, 2**32)))
    ledger, plain, read = Ledger(heads, sum(fresh)), ByLists(heads), 0
    for number, count in enumerate(fresh):
        plain.read(read, read + count)
        read += count
        if number == 0:
            plain.remember()  # before any compression
        if number == len(fresh) - 1:
            break
        kept = []
        for layer in plain.heads:
            keep = chance.randint(1, len(layer[0]))
            rows = [sorted(chance.sample(range(len(head)), keep)) for head in layer]
            kept.append(np.array(rows, np.int32))
        ledger.compress(kept, read)
        plain.compress(kept)
    plain.remember()  # the end of the text
    return heads, ledger.lives(), plain


@given(readings())
def test_every_head_holds_at_every_step_what_its_list_holds(
    reading: tuple[list[int], Lives, ByLists],
) -> None:
    heads, lives, plain = reading
    assert lives.heads == tuple(heads)
    assert lives.steps == len(plain.states)
    for step, state in enumerate(plain.states):
        held = [np.flatnonzero(row).tolist() for row in lives.held(step)]
        assert held == [sorted(head) for head in state]
        counts = [sum(token in head for head in state) for token in range(lives.tokens)]
        assert lives.counts(step).tolist() == counts


@given(readings())
def test_what_is_packed_for_the_page_comes_out_again(
    reading: tuple[list[int], Lives, ByLists],
) -> None:
    heads, lives, _ = reading
    data = zlib.decompress(base64.b64decode(packed(lives.gone)))
    assert width(lives.gone) == 1
    # As the page's script reads it: head after head of each token.
    flat = [data[token * sum(heads) : (token + 1) * sum(heads)] for token in range(lives.tokens)]
    assert [list(row) for row in flat] == lives.gone.T.tolist()


def test_more_than_255_compressions_take_two_bytes() -> None:
    gone = np.array([[NEVER, 255, 256, 999]], np.int32)
    assert width(gone) == 2
    data = zlib.decompress(base64.b64decode(packed(gone)))
    assert np.frombuffer(data, "<u2").tolist() == gone[0].tolist()
    assert width(gone[:, :2]) == 1


def test_nothing_compressed_is_all_held() -> None:
    lives = Ledger([2, 2], 5).lives()
    assert lives.steps == 2
    assert lives.counts(0).tolist() == lives.counts(1).tolist() == [4] * 5


def test_only_nothing_has_no_colour_and_only_all_the_last() -> None:
    for heads in (1, 2, 6, 90, 2560):
        levels = maps.levels(heads)
        assert levels[0] == 0
        assert min(levels[1:]) > 0
        assert levels == sorted(levels)
        assert levels[-1] == 10
        counted = [step for step, _ in maps.legend(heads)]
        assert counted == sorted(set(levels))
    assert maps.legend(2) == [(0, "0"), (8, "1"), (10, "2")]


def test_a_map_of_a_text_tells_its_parts_apart() -> None:
    """Four tokens, one compression that keeps the first and the last: two runs at the end."""
    ledger = Ledger([1], 4)
    ledger.compress([np.array([[0, 3]], np.int32)], 4)
    drawn = maps.survival(ledger.lives(), [False, False, True, False], label="<b>")
    assert "<b>" not in drawn
    assert drawn.count('class="needle"') == 1
    (path,) = (part for part in drawn.split("<path") if 'class="held c10"' in part)
    assert path.count("M") == 1 + 2 + 2  # all; then two runs after it, and at the end
