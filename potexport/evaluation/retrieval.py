"""The tasks `needle` and `hit-rate`: one reading of each document serves both.

Decides who reads what before a question, and which tokens count as important. The documents are
`needles`', the figures `tables`'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from potexport.evaluation.ask import Answer, ask
from potexport.evaluation.loop import Loop, Mark, latest
from potexport.evaluation.needles import Document, Question
from potexport.evaluation.settings import Mode, Tell
from potexport.runtime.backend import Array
from potexport.runtime.session import Ids

if TYPE_CHECKING:
    from potexport.evaluation.untouched import Untouched


@dataclass
class Seen:
    """What one reader made of one document. held: tokens in memory when it was asked; rates:
    (L,) of each question."""

    held: float
    compressions: float = 0.0
    answers: list[tuple[Question, Answer]] = field(default_factory=list)
    rates: list[Array] = field(default_factory=list)


# Who read, whether the question was known -> what came of each document, in their order.
Table = dict[tuple[str, Mode], list[Seen]]


@dataclass(frozen=True)
class Readers:
    """Who is to read, and how.

    policies: labels. depending: those whose choice depends on the question; the others read once
    for both modes. untouched: None where no model was given.
    """

    loop: Loop
    untouched: Untouched | None
    policies: tuple[str, ...]
    depending: frozenset[str]
    modes: tuple[Mode, ...]

    def readings(self, policy: str) -> list[tuple[Mode, tuple[Mode, ...]]]:
        """(how to read, the modes it stands for)."""
        if policy in self.depending:
            return [(mode, (mode,)) for mode in self.modes]
        return [("unknown", self.modes)]


class Retrieval:
    """Reads documents of one length, asks, and looks at what was held.

    notes: sentences about what could not be done. Every row has all documents: a baseline that
    cannot read one of them reads none.
    """

    def __init__(
        self,
        readers: Readers,
        documents: Sequence[Document],
        *,
        needle: bool,
        hits: bool,
        tell: Tell,
    ) -> None:
        self.readers, self.needle, self.hits, self.tell = readers, needle, hits, tell
        self.table: Table = defaultdict(list)
        self.notes: list[str] = []
        pot = readers.loop.session.manifest.pot
        asked = max(question.size for each in documents for question in each.questions)
        # Tokens that fit the pot beside the longest question and its answer.
        self._room = pot.slots + pot.smallest - asked
        self._kept = min(readers.loop.keep, self._room)
        least = max(each.head.size for each in documents)
        self.baselines = {"truncation"} if self._room > least else set()
        if not self.baselines:
            self.notes.append(
                f"truncation is missing: with its head and a question of {asked} tokens, the chat "
                "fills the pot"
            )
        if needle:
            facts = max(each.head.size + self._facts(each).size for each in documents)
            if facts <= self._kept:
                self.baselines.add("oracle")
            else:
                self.notes.append(
                    f"oracle is missing: the needles alone take {facts} tokens, and {self._kept} "
                    "are kept"
                )

    def read(self, document: Document, name: str) -> None:
        """One document, by all readers."""
        paid: list[list[Array]] = []
        if self.readers.untouched is not None:
            self.tell(f"{name}: full")
            paid = self._full(self.readers.untouched, document)
        if "oracle" in self.baselines:
            self.tell(f"{name}: oracle")
            self._oracle(document)
        beginning = self.readers.loop.begin(document.ids)
        for policy in self.readers.policies:
            for mode, modes in self.readers.readings(policy):
                self.tell(f"{name}: {policy}, question {mode}")
                read = self._known if mode == "known" else self._unknown
                self._add(policy, modes, read(beginning, document, policy, paid))
        if "truncation" in self.baselines:
            self.tell(f"{name}: truncation")
            self._truncation(document, paid)

    def _add(self, reader: str, modes: Sequence[Mode], seen: Seen) -> None:
        for mode in modes:
            self.table[reader, mode].append(seen)

    def _full(self, untouched: Untouched, document: Document) -> list[list[Array]]:
        """Asks the untouched model; for each question the attention to each token, of each layer
        that the bundle compresses (Hkv, n)."""
        untouched.read(document.ids)
        if self.needle:
            answers = [(question, untouched.ask(question)) for question in document.questions]
            self._add("full", self.readers.modes, Seen(document.ids.size, 0.0, answers))
        if not self.hits:
            return []
        chosen = self.readers.loop.session.manifest.layout.chosen
        paid = [untouched.attention(q.given) for q in document.questions]
        return [[each[layer] for layer in chosen] for each in paid]

    def _unknown(
        self, beginning: Mark, document: Document, policy: str, paid: list[list[Array]]
    ) -> Seen:
        """Read once, and ask each question from there."""
        loop = self.readers.loop
        held = loop.read(beginning, document.ids, policy)
        seen = Seen(held.slots, held.compressions)
        seen.rates = [hit_rate(held.tokens, each, loop.keep) for each in paid]
        if self.needle:
            seen.answers = self._ask_each(document)
        return seen

    def _known(
        self, beginning: Mark, document: Document, policy: str, paid: list[list[Array]]
    ) -> Seen:
        """Read anew for each question, which scores the pot."""
        loop, slots, compressions = self.readers.loop, [], []
        seen = Seen(0.0)
        for i, question in enumerate(document.questions):
            held = loop.read(beginning, document.ids, policy, question.text)
            slots.append(held.slots)
            compressions.append(held.compressions)
            if self.needle:
                seen.answers.append((question, ask(loop.session, question)))
            if paid:
                seen.rates.append(hit_rate(held.tokens, paid[i], loop.keep))
        seen.held, seen.compressions = float(np.mean(slots)), float(np.mean(compressions))
        return seen

    def _ask_each(self, document: Document) -> list[tuple[Question, Answer]]:
        loop = self.readers.loop
        here = loop.mark()
        answers = []
        for question in document.questions:
            loop.back(here)
            answers.append((question, ask(loop.session, question)))
        return answers

    def _oracle(self, document: Document) -> None:
        """Who knew before: the sentences with the needles, and the latest prose behind them, as
        many tokens as a policy keeps."""
        begin = np.concatenate([document.head, self._facts(document)])
        ids = latest(begin, document.ids[document.head.size :], self._kept)
        self.readers.loop.read_whole(ids)
        self._add("oracle", self.readers.modes, Seen(ids.size, 0.0, self._ask_each(document)))

    def _truncation(self, document: Document, paid: list[list[Array]]) -> None:
        """As many of the last tokens as the whole pot holds beside a question and its answer."""
        loop = self.readers.loop
        ids = latest(document.head, document.ids[document.head.size :], self._room)
        loop.read_whole(ids)
        seen = Seen(ids.size)
        if self.needle:
            seen.answers = self._ask_each(document)
        layout = loop.session.manifest.layout
        first, last = np.split(np.arange(document.ids.size, dtype=np.int32), [document.head.size])
        numbers = latest(first, last, self._room)
        held = [np.broadcast_to(numbers, (layout.facts.kv_heads, numbers.size))]
        held *= len(layout.chosen)
        seen.rates = [hit_rate(held, each, loop.keep) for each in paid]
        self._add("truncation", self.readers.modes, seen)

    def _facts(self, document: Document) -> Ids:
        return self.readers.loop.session.text.encode(f"{document.facts} ", trusted=False)


def hit_rate(held: Sequence[Array], paid: Sequence[Array], count: int) -> Array:
    """(L,) share of the `count` tokens that got most attention which are still held; the mean of
    the heads.

    Source: arXiv 2410.01518, figure 2. Differs: the attention is the question's; ours is per head.

    Args:
        held: L x (Hkv, n) tokens by number. paid: L x (Hkv, N) attention to each token.
    """
    rates = []
    for tokens, attention in zip(held, paid, strict=True):
        top = min(count, attention.shape[-1])
        best = np.argpartition(-attention, top - 1, axis=-1)[:, :top]
        still = np.zeros(attention.shape, bool)
        np.put_along_axis(still, np.asarray(tokens, np.int64), True, axis=-1)
        rates.append(np.take_along_axis(still, best, axis=-1).mean())
    return np.array(rates)
