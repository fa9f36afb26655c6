"""Documents with four facts hidden in prose, and what is asked about them.

Decides the facts, their depths, and which tokens of an answer count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from potexport.errors import PotexportError
from potexport.evaluation.prose import Prose
from potexport.runtime import reading
from potexport.runtime.backend import Array
from potexport.runtime.session import Ids
from potexport.runtime.text import Text

BINS = 8  # of depth; a document has a needle in every second one, and the next in the others
SLACKS = (0.02, 0.1, 0.3)  # shares of a document left for sentences that encode otherwise together


@dataclass(frozen=True)
class Kind:
    """One sort of fact: its sentence, its question, and the beginning of the answer."""

    name: str
    sentence: str
    question: str
    answer: str
    things: tuple[str, ...]


KINDS = (
    Kind(
        "code",
        "The secret code of the {thing} is {number}.",
        "What is the secret code of the {thing}?",
        "The secret code of the {thing} is",
        ("lighthouse", "windmill", "old library", "chapel", "granary", "boathouse"),
    ),
    Kind(
        "telephone",
        "The telephone number of the {thing} is {number}.",
        "What is the telephone number of the {thing}?",
        "The telephone number of the {thing} is",
        ("bakery", "tailor", "dentist", "florist", "blacksmith", "grocer"),
    ),
    Kind(
        "weight",
        "The weight of the {thing} in grams is {number}.",
        "What is the weight of the {thing} in grams?",
        "The weight of the {thing} in grams is",
        ("golden statue", "meteorite", "iron bell", "crystal vase", "silver anchor", "marble lion"),
    ),
    Kind(
        "ticket",
        "The ticket that won the {thing} had the number {number}.",
        "Which number did the ticket have that won the {thing}?",
        "The ticket that won the {thing} had the number",
        ("summer lottery", "harvest raffle", "school draw", "parish tombola", "regatta raffle"),
    ),
)


@dataclass(frozen=True)
class Question:
    """What is asked behind a document, and the tokens that answer it.

    given: the question as the chat has it and the beginning of the answer; wanted: (n,), the tokens
    of the number; digits: whether each of them is one digit.
    """

    kind: str
    text: str
    given: Ids
    wanted: Ids
    digits: bool
    depth: float

    @property
    def size(self) -> int:
        return self.given.size + self.wanted.size


@dataclass(frozen=True)
class Document:
    """ids: the chat's head and the text. facts: the sentences that hold the needles, in order."""

    ids: Ids
    head: Ids
    facts: str
    questions: tuple[Question, ...]


def documents(text: Text, prose: Prose, *, length: int, count: int, seed: int) -> list[Document]:
    """`count` documents of exactly `length` tokens, the chat's head included.

    Raises PotexportError for a length that cannot hold the needles, or a text that is too short.
    """
    starts = prose.starts(text, length=length, count=count, seed=seed)
    return [_document(text, prose, start, length, seed, i) for i, start in enumerate(starts)]


def _document(text: Text, prose: Prose, start: int, length: int, seed: int, index: int) -> Document:
    random = np.random.default_rng([seed, length, index])
    bins = random.permutation(len(KINDS)) * (BINS // len(KINDS)) + index % 2
    depths = (bins + random.random(len(KINDS))) / BINS
    numbers = random.choice(np.arange(10_000, 100_000), len(KINDS), replace=False)
    words = [
        {"thing": str(random.choice(kind.things)), "number": str(number)}
        for kind, number in zip(KINDS, numbers, strict=True)
    ]
    facts = [kind.sentence.format(**w) for kind, w in zip(KINDS, words, strict=True)]
    around = reading.frame(text, question=None, system=None, raw=False)
    room = length - around.head.size
    for slack in SLACKS:
        body = _body(text, prose, start, facts, depths, room, slack, trusted=around.trusted)
        if body is not None:
            ids, places = body
            break
    else:
        raise PotexportError(
            f"documents of {length} tokens are too short for {len(KINDS)} needles between prose; "
            "give a larger --length"
        )
    questions = [
        question(text, kind, word, depth=place / room)
        for kind, word, place in zip(KINDS, words, places, strict=True)
    ]
    in_order = " ".join(facts[i] for i in np.argsort(places))
    return Document(np.concatenate([around.head, ids]), around.head, in_order, tuple(questions))


def _body(
    text: Text,
    prose: Prose,
    start: int,
    facts: Sequence[str],
    depths: Array,
    room: int,
    slack: float,
    *,
    trusted: bool,
) -> tuple[Ids, list[int]] | None:
    """(ids (room,), the token where each fact begins); None if a fact would be cut off."""

    def size(sentence: str) -> int:
        return text.encode(f" {sentence}", trusted=trusted).size

    free = room * (1 - slack) - sum(map(size, facts))
    parts: list[str] = []
    begins = [0]  # of each sentence, and where the last one ends
    following = iter(prose.sentences[start:])
    for sentence in following:
        begins.append(begins[-1] + size(sentence))
        if begins[-1] > free:
            break
        parts.append(sentence)
    if len(parts) < 2:
        return None
    wanted = depths * begins[len(parts)]
    for i in np.argsort(depths)[::-1]:
        nearest = np.abs(np.array(begins[: len(parts)]) - wanted[i]).argmin()
        parts.insert(int(nearest), facts[i])
    whole = " ".join(parts)
    while (ids := text.encode(whole, trusted=trusted)).size < room:
        whole = f"{whole} {sentence}"
        sentence = next(following, prose.sentences[0])
    places = [whole.index(fact) for fact in facts]
    ends = [p + len(fact) for p, fact in zip(places, facts, strict=True)]
    if max(text.encode(whole[:end], trusted=trusted).size for end in ends) > room:
        return None
    return ids[:room], [text.encode(whole[:p], trusted=trusted).size for p in places]


def question(text: Text, kind: Kind, words: dict[str, str], *, depth: float) -> Question:
    """Teacher forcing: the answer is begun, and its number given token by token; what each token's
    logits say of the next is the same as what a greedy answer would have said while it is right."""
    asked = kind.question.format(**words)
    around = reading.frame(text, question=asked, system=None, raw=False)
    begin = kind.answer.format(**words)
    if around.trusted:  # no template, which would have ended in a line of its own
        begin = f"\n{begin}"
    answer = text.encode(f"{begin} {words['number']}")
    shown = [text.decode([token]) for token in answer]
    # Backwards: `thing` may have a number of its own one day.
    first = answer.size
    while first and (not shown[first - 1].strip() or shown[first - 1].strip().isdigit()):
        first -= 1
    while not shown[first].strip():  # a blank of its own is given
        first += 1
    return Question(
        kind=kind.name,
        text=asked,
        given=np.concatenate([around.tail, answer[:first]]),
        wanted=answer[first:],
        digits=all(len(each.strip()) == 1 for each in shown[first:]),
        depth=depth,
    )
