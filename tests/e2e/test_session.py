"""The Python API on a real bundle: what an application's author relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potexport.errors import PotexportError
from potexport.runtime.backend import Array
from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session


@pytest.fixture
def session(bundle: Path) -> Session:
    return Session.open(bundle, threads=1)


def test_reading_and_answering_keeps_the_books(session: Session, book: str) -> None:
    ids = session.text.encode(book)
    seen: list[tuple[int, int]] = []
    session.feed(ids, on_progress=lambda done, total: seen.append((done, total)))
    tokens = list(session.generate(max_new_tokens=70, sampling=Sampling(temperature=1.0, seed=1)))
    stats = session.stats
    assert stats.tokens_read == ids.size
    assert stats.tokens_generated == len(tokens)
    assert stats.compressions > 20
    assert stats.fill <= session.manifest.pot.slots
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {ids.size}
    assert "".join(token.text for token in tokens) == session.text.decode(t.id for t in tokens)


def test_the_same_seed_gives_the_same_answer_and_reset_forgets(session: Session, book: str) -> None:
    def answer(seed: int) -> list[int]:
        session.reset()
        session.feed(book)
        sampling = Sampling(temperature=20.0, top_k=40, top_p=0.9, seed=seed)
        return [token.id for token in session.generate(max_new_tokens=20, sampling=sampling)]

    assert answer(3) == answer(3) != answer(4)


def test_an_answer_may_be_continued(session: Session, book: str) -> None:
    """Ten tokens and ten more are twenty: a generator left early loses nothing."""
    session.feed(book)
    at_once = [token.id for token in session.generate(max_new_tokens=20)]
    session.reset()
    session.feed(book)
    stream = session.generate(max_new_tokens=20)
    first = [next(stream).id for _ in range(10)]
    stream.close()  # type: ignore[attr-defined]
    assert [*first, *(t.id for t in session.generate(max_new_tokens=10))] == at_once


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([5, 307], "token id 307 is outside the vocabulary of 307"),
        ([-1], "token id -1 is outside"),
        ([2**40], "outside the vocabulary"),
        ([1.5], "flat list of whole numbers"),
        ([[1, 2]], "flat list of whole numbers"),
    ],
)
def test_ids_that_are_none_are_refused_before_anything_is_read(
    session: Session, ids: list[int], says: str
) -> None:
    with pytest.raises(PotexportError, match=says):
        session.feed(ids)
    assert session.stats.tokens_read == 0


def test_generating_needs_something_to_continue(session: Session) -> None:
    session.feed("")
    with pytest.raises(PotexportError, match="feed at least one token"):
        session.generate()
    with pytest.raises(PotexportError, match="at least 1"):
        session.generate(max_new_tokens=0)


def test_a_long_catalyst_is_cut_to_its_end(session: Session) -> None:
    width = session.manifest.pot.catalyst_width
    assert session.set_catalyst(np.arange(3, 3 + width + 5, dtype=np.int32)) == 5
    assert session.catalyst.tolist() == list(range(8, 8 + width))
    with pytest.raises(PotexportError, match="the catalyst is empty"):
        session.set_catalyst("")


def test_what_is_pinned_stays_through_every_compression(session: Session, book: str) -> None:
    """Of whatever kind, and whatever is read behind it."""
    ids = session.text.encode(book)
    session.feed(ids[:5])
    assert session.pin() == 5
    session.feed(ids[5:12])
    assert session.pinned == 5
    assert session.pin() == 12  # all so far
    kept: list[Array] = []
    session.on_compress = lambda slots: kept.extend(each.copy() for each in slots)
    session.feed(ids[12:400])
    session.keep = "auto"
    session.feed(ids[400:600])
    session.keep = 24
    session.feed(ids[600:700], to_come=5)
    session.compress(16)
    assert {each.shape[1] for each in kept} > {16, 24}
    for each in kept:
        assert (each[:, :12] == np.arange(12)).all()
    with pytest.raises(PotexportError, match=r"has dropped 680 of the 700 tokens that are to be"):
        session.pin()
    assert session.pinned == 12
    session.reset()
    assert session.pinned == session.pin() == 0


def test_a_pin_leaves_room_for_what_is_recent(session: Session) -> None:
    session.feed(list(range(3, 24)))
    says = "21 tokens are to be pinned, and a compression that keeps 24 slots has room for 20"
    with pytest.raises(PotexportError, match=says):
        session.pin()
    assert session.pinned == 0
    session.keep = 25
    assert session.pin() == 21
    twin = session.fork()
    assert twin.pinned == 21
    session.keep = "auto"
    with pytest.raises(PotexportError, match=r"between pinned \+ recent \(25\) and 16"):
        session.compress()  # there are fewer as yet
    session.keep = 24
    with pytest.raises(PotexportError, match=r"keep is 24; .* pinned \+ recent \(25\) and 40"):
        session.check_keep()


@pytest.mark.parametrize("keep", [0, 47, 1000])
def test_a_keep_that_cannot_work_is_refused(session: Session, keep: int) -> None:
    session.feed(list(range(3, 60)))
    with pytest.raises(PotexportError, match=f"keep is {keep}; it must lie between"):
        session.compress(keep)
