"""A session that was saved, beside itself: whatever pot a bundle has, both go on bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from potexport.runtime.backend import Array
from potexport.runtime.sampling import Sampler, Sampling
from potexport.runtime.session import Session

TOKENS, PINNED = 256, 9
GREEDY, DRAWN = Sampling(), Sampling(temperature=1.5, top_k=50, seed=3)


def goes_on_alike(bundle: Path, folder: Path, policy: str | None = None) -> None:
    """Saved with a pinned beginning and a part of a chunk unread; loaded by another process's
    session, and by its own after it has read something else."""
    session, path = Session.open(bundle, threads=1, policy=policy), folder / "session.pot"
    session.set_catalyst([5, 9, 200, 33, 41])
    ids = np.random.default_rng(1).integers(3, 280, 153).astype(np.int32)
    session.feed(ids[:PINNED])
    session.pin()
    session.feed(ids[PINNED:])
    session.save(path)
    before = session.stats.compressions
    greedy = _generated(session, GREEDY)  # goes on as if nothing had been saved
    assert session.stats.compressions - before >= 5
    session.load(path)
    drawn = _generated(session, DRAWN)
    assert not np.array_equal(greedy[0], drawn[0])
    other = Session.open(bundle, threads=1, saved=path)
    assert _same(_generated(other, GREEDY), greedy)
    other.load(path)
    assert _same(_generated(other, DRAWN), drawn)


def _generated(session: Session, sampling: Sampling) -> list[Array]:
    """Tokens, the logits of each, and of each compression the kept slots."""
    sampler, tokens, logits, kept = Sampler(sampling), list[int](), list[Array](), list[Array]()

    def on_compress(slots: list[Array]) -> None:
        assert all((each[:, :PINNED] == np.arange(PINNED)).all() for each in slots)
        kept.append(np.concatenate([each.ravel() for each in slots]))

    session.on_compress = on_compress
    for _ in range(TOKENS):
        logits.append(session.logits().copy())
        tokens.append(sampler.pick(logits[-1]))
        session.accept(tokens[-1])
    session.on_compress = None
    return [np.array(tokens), np.stack(logits), np.concatenate(kept)]


def _same(mine: list[Array], theirs: list[Array]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(mine, theirs, strict=True))
