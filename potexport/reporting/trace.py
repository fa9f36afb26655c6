"""Read one text with a session, once for each policy, and write down what every head still holds.

It reads as `run` does: the same frame, the same calls. What is kept of it is one number for each
head and token (`ledger`), and the costs of each chunk.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potexport.errors import PotexportError
from potexport.progress import peak_memory
from potexport.reporting.ledger import Array, Ledger, Lives
from potexport.runtime import reading
from potexport.runtime.reading import Document, Frame
from potexport.runtime.session import Session
from potexport.runtime.text import Text


@dataclass(frozen=True)
class Chunk:
    """What one pass of reading cost: seconds of this chunk, the process's peak bytes after it.

    read: tokens read so far.
    """

    read: int
    read_seconds: float
    compress_seconds: float
    peak: int | None


@dataclass(frozen=True)
class Told:
    """One policy's reading, and what the model answered from what was left. cut: tokens of the
    question that were too many to score the pot."""

    policy: str
    lives: Lives
    chunks: tuple[Chunk, ...]
    answer: str
    cut: int = 0

    def to_json(self) -> dict[str, Any]:
        """held: tokens that any head holds at the end of the text."""
        lives = self.lives
        return {
            "policy": self.policy,
            "compressions": len(lives.read),
            "held": int((lives.counts(lives.steps - 1) > 0).sum()),
            "answer": self.answer,
        }


@dataclass(frozen=True)
class Asked:
    """What to read, and how. tokens: so many of the document at most. known: whether the question
    scores the pot while reading; or else the bundle's own instruction does. answer: longest answer,
    in tokens. marks: words to mark where they stand in the text."""

    document: Document
    question: str | None
    known: bool
    tokens: int
    answer: int
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A text and what policies held of it.

    pieces: N, the text of each token; together the text. head, tail: how many of them are the chat
    template's and the question's. marked: N bool. token_bytes: what the pot needs for one token in
    all layers; pot_bytes: for all of its slots.
    """

    name: str
    asked: Asked
    pieces: tuple[str, ...]
    head: int
    tail: int
    marked: tuple[bool, ...]
    told: tuple[Told, ...]
    token_bytes: float
    pot_bytes: int


def trace(
    session: Session,
    asked: Asked,
    *,
    policies: Sequence[str],
    on_policy: Callable[[str], AbstractContextManager[reading.Progress]],
) -> Trace:
    """Read the document's beginning once for each policy.

    on_policy: called with a policy's label; what it gives is entered for the reading, and told of
        the progress.
    Raises PotexportError for an empty document, and words to mark that are not in the text.
    """
    around = reading.frame(session.text, question=asked.question, system=None, raw=False)
    content = _beginning(session.text, asked, trusted=around.trusted)
    blocks = _document(content, asked).blocks()
    body = list(reading.pieces(session.text, blocks, trusted=around.trusted))
    ids = np.concatenate([around.head, *body, around.tail])
    pieces = _texts(session.text, ids)
    marked = _marked(pieces, asked.marks, range(around.head.size, ids.size - around.tail.size))
    told = []
    for label in policies:
        session.policy = label
        with on_policy(label) as on_progress:
            document = _document(content, asked)
            told.append(_follow(session, document, around, ids, asked, on_progress))
    pot = session.backend.pot
    return Trace(
        name=Path(asked.document.name).name,
        asked=asked,
        pieces=tuple(pieces),
        head=around.head.size,
        tail=around.tail.size,
        marked=tuple(marked),
        told=tuple(told),
        token_bytes=pot.bytes / session.manifest.pot.slots,
        pot_bytes=pot.bytes,
    )


def _follow(
    session: Session,
    document: Document,
    around: Frame,
    ids: Array,
    asked: Asked,
    on_progress: reading.Progress,
) -> Told:
    layout = session.manifest.layout
    ledger = Ledger([layout.facts.kv_heads] * len(layout.chosen), ids.size)
    chunks: list[Chunk] = []

    def compressed(kept: list[Array]) -> None:
        if not session.stats.tokens_generated:  # the answer is not part of the text
            ledger.compress(kept, session.stats.tokens_read)

    def progressed(read: int, total: int | None) -> None:
        stats = session.stats
        chunks.append(
            Chunk(
                read=stats.tokens_read,
                read_seconds=stats.read_seconds - sum(c.read_seconds for c in chunks),
                compress_seconds=stats.compress_seconds - sum(c.compress_seconds for c in chunks),
                peak=peak_memory(),
            )
        )
        on_progress(read, total)

    session.reset()
    known = asked.question if asked.known else None
    own = session.manifest.catalyst_of(session.backend.policy)
    cut = session.set_catalyst(own if known is None else known)
    session.on_compress = compressed
    try:
        reading.read(session, document, around, answer=asked.answer, on_progress=progressed)
        answer = [token.text for token in session.generate(max_new_tokens=asked.answer)]
    finally:
        session.on_compress = None
    read = session.stats.tokens_read
    if read != ids.size:
        raise RuntimeError(f"{read} tokens were read where the text has {ids.size}")
    return Told(session.policy, ledger.lives(), tuple(chunks), "".join(answer).strip(), cut)


def _document(content: str, asked: Asked) -> Document:
    """A document that was cut, under its own name."""
    data = content.encode()
    return Document(io.BytesIO(data), name=asked.document.name, size=len(data))


def _beginning(text: Text, asked: Asked, *, trusted: bool) -> str:
    """The document's first `tokens` tokens, less one that ends within a character; all of it, as it
    is, if it has no more."""
    stream, left, found, whole = text.stream(), asked.tokens, "", list[str]()

    def blocks() -> Iterator[str]:
        for block in asked.document.blocks():
            whole.append(block)
            yield block

    for ids in reading.pieces(text, blocks(), trusted=trusted):
        if ids.size > left:
            return found + "".join(stream.push(int(i)) for i in ids[:left])
        found += "".join(stream.push(int(i)) for i in ids)
        left -= ids.size
    return "".join(whole)


def _texts(text: Text, ids: Array) -> list[str]:
    """The text that each token completes, the names of special tokens included."""
    named = {text.token_id(name): name for name in text.specials.values()}
    stream = text.stream()
    found = [stream.push(int(i)) or named.get(int(i), "") for i in ids]
    if found:
        found[-1] += stream.flush()
    return found


def _marked(pieces: Sequence[str], words: Sequence[str], within: range) -> list[bool]:
    """Which tokens are part of one of the words, wherever these stand `within` some tokens."""
    text = "".join(pieces[i] for i in within)
    spans = []
    for word in words:
        at = text.find(word)
        if at < 0:
            raise PotexportError(
                f"the words to mark, {word!r}, are not in what is read of the text; check --mark, "
                "or read more --tokens"
            )
        while at >= 0:
            spans.append((at, at + len(word)))
            at = text.find(word, at + 1)
    found, end = [False] * len(pieces), 0
    for i in within:
        start, end = end, end + len(pieces[i])
        found[i] = any(start < last and first < end for first, last in spans)
    return found
