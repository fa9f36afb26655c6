"""From a document of any length and a question to the calls of a session.

Decides how a document is cut for the tokenizer, what stands around it, and what a session is told
of what is still to come. It neither prints nor chooses tokens. Nothing grows with the document.
"""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from potexport.errors import PotexportError
from potexport.runtime.ids import Ids
from potexport.runtime.session import Session
from potexport.runtime.text import Text

# Tokens read, and how many there are: an estimate until the document's end is in sight, None where
# its length is unknown.
Progress = Callable[[int, int | None], None]

PIECE = 1 << 16  # characters; the tokenizer needs some 200 bytes for each
AROUND = 1 << 10  # characters on both sides of a cut that must be encoded the same with and without
TRIES, STEPS = 4, 8  # cuts of each kind within AROUND characters; how often to go back by AROUND
# Where pre-tokenizers split: the first suits Llama 3's rules, the second GPT-2's, the last texts
# without lines. `_joins` decides whether one suits this tokenizer.
CUTS = tuple(map(re.compile, (r"(?<=\n)(?=\S)", r"(?=\n\S)", r"(?= \S)")))


class Document:
    """UTF-8 text that is read block by block, from a file, a pipe or a string."""

    def __init__(self, stream: BinaryIO, *, name: str, size: int | None) -> None:
        """size: in bytes, None if unknown."""
        self.name, self.size = name, size
        self._stream = stream

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Document:
        try:
            stream = Path(path).open("rb")  # noqa: SIM115  (read in `blocks`)
        except OSError as error:
            raise PotexportError(f"{path} cannot be read: {error.strerror}") from error
        size = os.fstat(stream.fileno()).st_size if stream.seekable() else None
        return cls(stream, name=str(path), size=size)

    @classmethod
    def of(cls, text: str) -> Document:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise PotexportError(
                "the prompt is not valid Unicode; type it in a UTF-8 terminal, or use --file"
            ) from error
        return cls(io.BytesIO(data), name="the prompt", size=len(data))

    def blocks(self, characters: int = PIECE) -> Iterator[str]:
        """The text, once, in blocks; without its byte order mark, with "\\n" for any line end."""
        # The wrapper would close a stream that is not ours.
        reader = io.TextIOWrapper(self._stream, encoding="utf-8-sig")
        try:
            while block := reader.read(characters):
                yield block
        except UnicodeDecodeError as error:
            raise PotexportError(
                f"{self.name} is not UTF-8 text ({error.reason}); convert it, for example with "
                "iconv -t UTF-8"
            ) from error
        except OSError as error:
            raise PotexportError(f"{self.name} cannot be read: {error.strerror}") from error
        finally:
            if not reader.closed:
                reader.detach()

    def share(self) -> float | None:
        """How much of it was taken, from 0 to 1; None if its size is unknown."""
        return self._stream.tell() / self.size if self.size else None


# What the note of a saved session says of what it holds; of a chat, whether a text was read yet.
RAW, CHAT, BARE = "raw", "chat", "chat without a text"


@dataclass(frozen=True)
class Frame:
    """What stands around a document; `trusted` documents may speak in special tokens."""

    head: Ids
    tail: Ids
    trusted: bool

    def note(self, before: str, read: int) -> str:
        """Of a session whose note was `before`, and that has read so many tokens of text since."""
        if self.trusted:
            return RAW
        return CHAT if read or before == CHAT else BARE


def frame(
    text: Text, *, question: str | None, system: str | None, raw: bool, note: str | None = None
) -> Frame:
    """The model's chat template around a document, with the question behind it; without a template,
    or if `raw`, only the tokenizer's own beginning.

    note: of a session that goes on, and has read what stands before the document.
    """
    after = f"\n\n{question}" if question and note != BARE else question or ""
    if text.has_template and not (raw or note == RAW):
        mask = text.controls.mask()
        head, tail = text.frame(mask.over(system), "", mask.over(after))
        mask.check(head + tail)
        opening, _ = text.controls.encode(head if note is None else "", mask)
        return Frame(opening, text.controls.encode(tail, mask)[0], trusted=False)
    if system is not None:
        why = "--raw leaves it out" if raw else "this bundle has none"
        raise PotexportError(f"a system prompt needs the chat template, and {why}; omit --system")
    begin = text.token_id(text.specials.get("bos_token", ""))
    # A tokenizer may add an end as well, which would tell the model to stop.
    first = text.encode("", special=True)[: 1 if note is None else 0]
    return Frame(first[first == begin], text.encode(after), trusted=True)


def pieces(text: Text, blocks: Iterable[str], *, trusted: bool) -> Iterator[Ids]:
    """The ids that encoding the whole text gives, piece by piece, each of about one block.

    A cut is made where the text around it has the same ids with and without it. Where a tokenizer
    has no such place (SentencePiece puts a blank before each text), the rest comes in one piece.
    """
    held, searched = "", 0
    for block in blocks:
        held += block
        # Doubling: a text without cuts is not searched again and again.
        if len(held) < max(2 * AROUND, 2 * searched):
            continue
        cut = _cut(text, held, searched, trusted=trusted)
        searched = len(held)
        if cut:
            yield text.encode(held[:cut], trusted=trusted)
            held, searched = held[cut:], 0
    if held:
        yield text.encode(held, trusted=trusted)


def _cut(text: Text, held: str, searched: int, *, trusted: bool) -> int:
    """A place to cut, late in `held`; 0 if there is none."""
    last = len(held) - AROUND
    # Backwards in steps, for the best place is the last; not far, for then there are none.
    earliest = max(searched, last - STEPS * AROUND, AROUND) - AROUND
    for first in range(last - AROUND, earliest - 1, -AROUND):
        for kind in CUTS:
            found = (match.start() for match in kind.finditer(held, first, first + AROUND + 1))
            for at in islice(found, TRIES):
                if at and _joins(text, held, at, trusted=trusted):
                    return at
    return 0


def _joins(text: Text, held: str, at: int, *, trusted: bool) -> bool:
    left, right = held[max(at - AROUND, 0) : at], held[at : at + AROUND]
    both = text.encode(left + right, trusted=trusted)
    parts = [text.encode(part, trusted=trusted) for part in (left, right)]
    return np.array_equal(both, np.concatenate(parts))


def read(
    session: Session,
    document: Document,
    around: Frame,
    *,
    answer: int,
    on_progress: Progress = lambda read, total: None,
    on_head: Callable[[], object] = lambda: None,
    on_text: Callable[[int], None] = lambda read: None,
    may_be_empty: bool = False,
) -> None:
    """Feed head, document and tail. So much is encoded ahead as fits the pot, so that its last
    compressions keep what fits beside the rest and an answer of `answer` tokens.

    on_head: called when the head was fed. on_text: called before the tail is fed, with the tokens
    of the document. Raises PotexportError for an empty document, unless it `may_be_empty`.
    """
    slots = session.manifest.pot.slots
    waiting = deque([around.head])
    ahead = encoded = around.head.size
    done, parts = 0, 0

    def feed(to_come: int, total: int | None) -> None:
        nonlocal done, parts
        ids = waiting.popleft()
        session.feed(
            ids,
            to_come=to_come,
            on_progress=lambda read, _: on_progress(done + read, total),
        )
        done, parts = done + ids.size, parts + 1
        if parts == 1:
            on_head()

    for ids in pieces(session.text, document.blocks(), trusted=around.trusted):
        waiting.append(ids)
        ahead, encoded = ahead + ids.size, encoded + ids.size
        while ahead - waiting[0].size > slots:
            ahead -= waiting[0].size
            share = document.share()
            feed(ahead, int(encoded / share) if share else None)
    text = encoded - around.head.size
    if not (text or may_be_empty):
        raise PotexportError(
            f"{document.name} is empty; give at least one character of text to read"
        )
    waiting.append(around.tail)
    ahead, encoded = ahead + around.tail.size, encoded + around.tail.size
    while waiting:
        ahead -= waiting[0].size
        if len(waiting) == 1:
            on_text(text)
        feed(ahead + answer, encoded)
