"""Control tokens that a chat template writes, told from their names where somebody typed them.

A rendered chat is one text, and in it `<|im_end|>` looks the same whoever wrote it. So what is
typed is rendered with marks in place of such names; the names that are left are the template's. All
of it is encoded at once, for tokens merge across the border of template and content.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from potexport.errors import PotexportError
from potexport.runtime.ids import Ids
from potexport.runtime.tokenizer import guarded, literal


def encoding(tokenizer: Tokenizer, text: str, *, special: bool = False) -> Encoding:
    """special: with the tokenizer's own BOS and EOS. PotexportError for lone surrogates."""
    try:
        with guarded():
            return tokenizer.encode(text, add_special_tokens=special)
    except TypeError as error:
        raise PotexportError(
            "the text is not valid Unicode; read it with the right encoding"
        ) from error


class Controls:
    """A twin of a tokenizer in which control tokens have secret names, and their own are letters.

    names: of the control tokens: those marked special, and BOS, EOS and their like.
    """

    def __init__(self, tokenizer: Tokenizer, specials: Iterable[str]) -> None:
        """specials: control tokens, whether they are marked special or not."""
        twin = literal(tokenizer)
        added = {each.content: each for each in twin.get_added_tokens_decoder().values()}
        control = {name for name, each in added.items() if each.special}
        unmarked = (set(specials) - control) & set(added)
        twin.add_special_tokens([AddedToken(name, normalized=False) for name in unmarked])
        self.names = frozenset(control | unmarked)
        key = secrets.token_hex(16)
        self._anchor = f"{key}x"  # a token before a text that does not begin where it seems to
        self._alias = {name: f"{key}{n}z" for n, name in enumerate(sorted(self.names))}
        like = [_alias(added[name], alias) for name, alias in self._alias.items()]
        twin.add_tokens([AddedToken(self._anchor, normalized=False), *like])
        self._ids = {
            twin.token_to_id(alias): twin.token_to_id(name) for name, alias in self._alias.items()
        }
        # The longest first, as the tokenizer takes them, and others that may hold such a name.
        self._added = _any_of(added)
        self.tokenizer = twin

    def mask(self) -> Mask:
        return Mask(self.names)

    def encode(self, rendered: str, mask: Mask, *, upto: int = 0) -> tuple[Ids, int]:
        """(ids of a rendered chat, how many of them lie within its first `upto` characters)."""
        made = encoding(self.tokenizer, self._written(rendered, mask))
        within = len(self._written(rendered[:upto], mask))
        # Where several tokens make one character, each ends where it does.
        count = next((n for n, (_, end) in enumerate(made.offsets) if end > within), len(made.ids))
        return self._own(made.ids), count

    def encode_rest(self, rendered: str, mask: Mask) -> Ids:
        """Ids of a part of a rendered chat that follows other text: nothing is put before it."""
        made = encoding(self.tokenizer, self._anchor + self._written(rendered, mask))
        return self._own(made.ids[1:])

    def _written(self, rendered: str, mask: Mask) -> str:
        named = self._added.sub(lambda found: self._alias.get(found[0], found[0]), rendered)
        return mask.lift(named)

    def _own(self, ids: list[int]) -> Ids:
        return np.array([self._ids.get(each, each) for each in ids], np.int32)


class Mask:
    """Marks in place of control tokens' names, unguessable, so that no text contains them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = _any_of(names)
        # Both cases, so that a template's change of case shows.
        self._key = f"pOt{secrets.token_hex(16)}"
        self._marks = re.compile(f"{self._key}n([0-9]+)e")
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """A mark that stands for the text."""
        self._hidden.append(text)
        return f"{self._key}n{len(self._hidden) - 1}e"

    def over(self, given: Any) -> Any:
        """A copy of plain JSON data with a mark for each name in any of its texts."""
        if isinstance(given, str):
            return self._names.sub(lambda found: self.hide(found[0]), given)
        if isinstance(given, Mapping):
            return {self.over(key): self.over(each) for key, each in given.items()}
        if isinstance(given, list):
            return [self.over(each) for each in given]
        return given

    def check(self, rendered: str) -> None:
        """Raise PotexportError where a template wrote a mark otherwise than it was given."""
        if self._key[:12].lower() in self._marks.sub("", rendered).lower():
            raise PotexportError(
                "the chat template alters a placeholder in a message; say it without the names of "
                "special tokens"
            )

    def lift(self, text: str) -> str:
        return self._marks.sub(lambda found: self._hidden[int(found[1])], text)


def _alias(token: AddedToken, name: str) -> AddedToken:
    """One like it that is read as a token wherever it stands."""
    return AddedToken(
        name,
        special=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Any of these texts, the longest that begins at a place; none has no place."""
    longest = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
