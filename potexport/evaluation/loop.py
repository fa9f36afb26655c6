"""A session as an evaluation drives it: a document is read once up to the first full pot, and from
there by each policy.

Decides how readings share their beginning, what is in memory when a question is asked, and which
tokens the slots hold. It knows no task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from potexport.runtime.backend import Array
from potexport.runtime.session import Ids, Session, State


@dataclass
class Origins:
    """Which tokens the pot holds, numbered from 0 as they were fed; follows every compression.

    kept: L x (Hkv, n) int32, tokens that the last compression kept. read: how many had been read
    by then: slots behind `kept` hold the tokens that came since, in order.
    """

    kept: list[Array] = field(default_factory=list)
    read: int = 0

    def follow(self, slots: list[Array], read: int) -> None:
        """slots: L x (Hkv, m) int32, which slots a compression kept, after `read` tokens."""
        self.kept = [self._tokens(layer, each) for layer, each in enumerate(slots)]
        self.read = read

    def _tokens(self, layer: int, slots: Array) -> Array:
        before = self.kept[layer] if self.kept else np.empty((slots.shape[0], 0), np.int32)
        width = before.shape[1]
        if not width:
            return slots.astype(np.int32) + self.read
        old = np.take_along_axis(before, np.minimum(slots, width - 1), axis=-1)
        return np.where(slots < width, old, slots - width + self.read).astype(np.int32)

    def held(self, read: int, *, layers: int, heads: int) -> list[Array]:
        """L x (Hkv, n) int32, all tokens that the slots hold after `read` tokens."""
        fresh = np.arange(self.read, read, dtype=np.int32)
        kept = self.kept or [np.empty((heads, 0), np.int32)] * layers
        more = np.broadcast_to(fresh, (heads, fresh.size))
        return [np.concatenate([each, more], axis=-1) for each in kept]


@dataclass(frozen=True)
class Mark:
    """A place in a reading to come back to, any number of times."""

    state: State
    kept: list[Array]
    read: int


@dataclass
class Cost:
    """What reading took after the first full pot, compressions before a question left out."""

    tokens: int = 0
    read_seconds: float = 0.0
    compress_seconds: float = 0.0
    compressions: int = 0

    @property
    def share(self) -> float:
        """Of compressions in all of it."""
        seconds = self.read_seconds + self.compress_seconds
        return self.compress_seconds / seconds if seconds else 0.0

    def to_json(self) -> dict[str, float]:
        return {**self.__dict__, "share": self.share}


@dataclass(frozen=True)
class Held:
    """What is in memory once a document was read. tokens: of each layer that is compressed (Hkv, n)
    int32, as fed; slots: the mean of n."""

    tokens: list[Array]
    compressions: int

    @property
    def slots(self) -> float:
        return float(np.mean([each.shape[-1] for each in self.tokens]))


class Loop:
    """Reads documents by the policies of one bundle."""

    def __init__(self, session: Session, *, keep: int, catalysts: Mapping[str, str]) -> None:
        """keep: slots that every compression keeps. catalysts: by policy, what scores the pot where
        the question is unknown."""
        self.session, self.keep, self.catalysts = session, keep, catalysts
        self.costs: dict[str, Cost] = {}
        self.cut = 0  # the most tokens of a question that did not fit the catalyst's width
        self._origins = Origins()
        opened = (session.manifest.policy_of(label) for label in session.policies)
        self._widest = max(opened, key=lambda policy: policy.window).label
        session.keep = keep
        session.on_compress = self._followed

    def _followed(self, slots: list[Array]) -> None:
        self._origins.follow(slots, self.session.stats.tokens_read)

    @property
    def shared(self) -> int:
        """So many tokens are read before anything is compressed, whatever the policy; one of them
        waits for the next."""
        pot = self.session.manifest.pot
        return (pot.slots + pot.smallest) // pot.chunk * pot.chunk + 1

    def begin(self, ids: Ids) -> Mark:
        """Read the beginning of a document, which all policies share."""
        # A session remembers its last tokens only for a policy that looks at them.
        self.choose(self._widest)
        self.session.reset()
        self._origins = Origins()
        self.session.feed(ids[: self.shared])
        return self.mark()

    def mark(self) -> Mark:
        return Mark(self.session.snapshot(), self._origins.kept, self._origins.read)

    def back(self, mark: Mark) -> None:
        self.session.restore(mark.state)
        self._origins = Origins(mark.kept, mark.read)

    def choose(self, policy: str, question: str | None = None) -> None:
        """Compress by this policy from now on; None for a question that is not known."""
        catalyst = self.catalysts[policy] if question is None else question
        if catalyst:  # first of all: a policy that cannot do without refuses to be set
            self.session.set_catalyst(catalyst)
        self.session.policy = policy
        cut = self.session.set_catalyst(catalyst)
        if question is not None:
            self.cut = max(self.cut, cut)

    def read(self, beginning: Mark, ids: Ids, policy: str, question: str | None = None) -> Held:
        """Go on from the beginning of `ids` to their end, and compress to exactly `keep` unless all
        of them fit the pot: so that every policy has the same memory when a question comes."""
        session = self.session
        self.back(beginning)
        self.choose(policy, question)
        before = session.stats
        session.feed(ids[self.shared :])
        session.logits()  # reads what still waits
        after = session.stats
        cost = self.costs.setdefault(policy, Cost())
        cost.tokens += after.tokens_read - before.tokens_read
        cost.read_seconds += after.read_seconds - before.read_seconds
        cost.compress_seconds += after.compress_seconds - before.compress_seconds
        cost.compressions += after.compressions - before.compressions
        if after.compressions and after.fill > self.keep:
            session.compress(self.keep)
        return Held(self.held(), session.stats.compressions)

    def held(self) -> list[Array]:
        layout = self.session.manifest.layout
        read = self.session.stats.tokens_read
        heads = layout.facts.kv_heads
        return self._origins.held(read, layers=len(layout.chosen), heads=heads)

    def read_whole(self, ids: Ids) -> Mark:
        """Read what fits the pot together with a question and its answer, without compressing."""
        self.session.reset()
        self._origins = Origins()
        self.session.feed(ids)
        return self.mark()


def latest(head: Ids, body: Ids, size: int) -> Ids:
    """Truncation: the head, and as many of the last tokens as fit `size` with it."""
    room = size - head.size
    return np.concatenate([head, body[max(0, body.size - room) :]])
