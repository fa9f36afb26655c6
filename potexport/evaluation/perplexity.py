"""The task `perplexity`: how surprising prose is while it is read through the pot.

Decides which tokens count: those that come after the pot was full for the first time, the same ones
for every reader. The surprise is the prefill graph's, where it has that output; otherwise it is
measured token by token, on the last SCORED of each document.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from potexport.evaluation.loop import Loop, Mark
from potexport.evaluation.retrieval import Readers
from potexport.evaluation.settings import Tell
from potexport.runtime.backend import Array
from potexport.runtime.sampling import surprise
from potexport.runtime.session import Ids

SCORED = 256


@dataclass
class Perplexity:
    """Reads passages of one length. nats: by reader, the surprises of each document."""

    readers: Readers
    length: int
    tell: Tell
    nats: dict[str, list[Array]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        loop = self.readers.loop
        chunk = loop.session.manifest.pot.chunk
        self.by_prefill = bool(loop.session.backend.pot.novelty)
        # Whole chunks behind the beginning; the token that waits at its end is not scored, for it
        # was foreseen before anything was dropped.
        chunks = (self.length - loop.shared) // chunk
        self.last = loop.shared - 1 + chunks * chunk
        self.first = loop.shared if self.by_prefill else max(loop.shared, self.last - SCORED)

    @staticmethod
    def least(loop: Loop) -> int:
        """The shortest length that has something to score."""
        return loop.shared + loop.session.manifest.pot.chunk

    def read(self, ids: Ids, name: str) -> None:
        """One passage, by all readers."""
        if self.readers.untouched is not None:
            self.tell(f"{name}: full")
            surprises = self.readers.untouched.surprises(ids[: self.last])
            self._add("full", surprises[self.first - 1 :])
        beginning = self.readers.loop.begin(ids)
        for policy in self.readers.policies:
            self.tell(f"{name}: {policy}")
            self.readers.loop.back(beginning)
            self.readers.loop.choose(policy)
            self._add(policy, self._scored(ids))
        self.tell(f"{name}: truncation")
        self._add("truncation", self._truncation(beginning, ids))

    def _add(self, reader: str, nats: Array) -> None:
        self.nats[reader].append(nats.astype(np.float64))  # sums of thousands

    def _scored(self, ids: Ids) -> Array:
        if self.by_prefill:
            return self._chunks(ids, renew=False)[1:]
        self.readers.loop.session.feed(ids[self.readers.loop.shared : self.first])
        return self._tokens(ids, renew=False)

    def _truncation(self, beginning: Mark, ids: Ids) -> Array:
        """In place of a compression, everything is forgotten and the last `keep` tokens are read
        again."""
        self.readers.loop.back(beginning)
        if self.by_prefill:
            return self._chunks(ids, renew=True)[1:]
        self._renew(ids, self.first)
        return self._tokens(ids, renew=True)

    def _chunks(self, ids: Ids, *, renew: bool) -> Array:
        """Surprises of the tokens from the one that waits; a chunk is read with each feed."""
        session = self.readers.loop.session
        chunk, found = session.manifest.pot.chunk, []
        for at in range(self.readers.loop.shared, self.last, chunk):
            if renew and chunk > session.backend.pot.room:
                self._renew(ids, at)
            session.feed(ids[at : at + chunk])
            pot = session.backend.pot
            last = pot.filled(0)
            found.append(pot.novelty[0][0, last - chunk : last].copy())
        return np.concatenate(found)

    def _tokens(self, ids: Ids, *, renew: bool) -> Array:
        """Surprises of the tokens from `first`, each from the logits before it."""
        session, found = self.readers.loop.session, []
        for at in range(self.first, self.last):
            if renew and not session.backend.pot.room:
                self._renew(ids, at)
            found.append(surprise(session.logits(), int(ids[at])))
            session.feed(ids[at : at + 1])
        return np.array(found)

    def _renew(self, ids: Ids, at: int) -> None:
        """Forget all; read the last tokens before `at`, of which one waits."""
        session, pot = self.readers.loop.session, self.readers.loop.session.manifest.pot
        fits = (pot.slots + pot.smallest) // pot.chunk - 1  # chunks, beside the one to come
        chunks = min(max(1, self.readers.loop.keep // pot.chunk), fits)
        session.reset()
        session.feed(ids[at - 1 - chunks * pot.chunk : at])
