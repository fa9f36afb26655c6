"""Passages of exactly so many tokens out of a long text, the same ones for the same seed.

Decides where a document begins, and how a text falls into sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from potexport.errors import PotexportError
from potexport.runtime.session import Ids
from potexport.runtime.text import Text

ENDS = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")
LONGEST = 60  # words; longer ones, as in a text without full stops, are cut
MOST = 1 << 23  # characters of the text that are looked at


@dataclass(frozen=True)
class Prose:
    """A text to take documents from."""

    name: str
    sha256: str
    content: str

    @cached_property
    def sentences(self) -> list[str]:
        found: list[str] = []
        for sentence in _split(self.content[:MOST]):
            parts = sentence.split()
            found += [" ".join(parts[i : i + LONGEST]) for i in range(0, len(parts), LONGEST)]
        return found

    def starts(self, text: Text, *, length: int, count: int, seed: int) -> list[int]:
        """The first sentence of each of `count` documents, spread over the whole text.

        Raises PotexportError for a text that is shorter than one of them.
        """
        # Sentences one by one, each with the blank before it: near enough to find places.
        sizes = np.array([text.encode(f" {s}", trusted=False).size for s in self.sentences])
        before = np.concatenate([[0], sizes.cumsum()])
        spare = int(before[-1]) - 2 * length  # a document may use up sentences that are cut off
        if spare < 0:
            raise PotexportError(
                f"{self.name} has some {int(before[-1])} tokens; documents of {length} take at "
                f"least {2 * length}: give a longer --text or a smaller --length"
            )
        places = np.random.default_rng([seed, length, count]).random(count)
        wanted = (np.arange(count) + places) / count * spare
        return [int(i) for i in np.searchsorted(before, wanted)]


def _split(text: str) -> Sequence[str]:
    """Sentences with their closing quotation marks."""
    ends = [match.end() for match in ENDS.finditer(text)]
    return [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]


def passages(
    text: Text, prose: Prose, opening: Ids, *, length: int, count: int, seed: int
) -> list[Ids]:
    """`count` documents of exactly `length` tokens, the opening included, without a chat."""
    starts = prose.starts(text, length=length, count=count, seed=seed)
    return [
        np.concatenate([opening, _passage(text, prose, start, length - opening.size)])
        for start in starts
    ]


def _passage(text: Text, prose: Prose, start: int, count: int) -> Ids:
    """`count` tokens from a sentence on."""
    sentences, size = prose.sentences, 0
    for last in range(start, len(sentences)):
        size += text.encode(f" {sentences[last]}", trusted=False).size
        if size >= count:
            ids = text.encode(" ".join(sentences[start : last + 1]), trusted=False)
            if ids.size >= count:
                return ids[:count]
    raise PotexportError(
        f"{prose.name} ends before a passage of {count} tokens does; give a longer --text"
    )
