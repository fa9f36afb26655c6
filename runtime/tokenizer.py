"""Opens a tokenizer.json, which is a program of a kind: regular expressions and replacements.

Decides what such a file may not ask for. The library that runs it is Rust: it panics where Python
would raise, and what it has begun cannot be stopped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from potexport.errors import PotexportError
from potexport.runtime.template import one_line

LONGEST_PATTERN = 8192
MOST_REPEATS = 3  # of no fixed number, one behind the other; no known pattern has more than two
MOST_GROWTH = 64  # characters that replacements make of one
# Runs of one character, of these lengths, may take so many seconds each to be encoded.
PROBES, MOST_SECONDS = (8, 64, 512, 1024), 0.2
COMMON = " \n\ta1!é한_"
MOST_PROBED = 32  # characters of a pattern that are tried


def open_tokenizer(path: Path, source: str) -> Tokenizer:
    """The tokenizer of a file whose text is `source`; PotexportError if it is none, or one that
    could run away with a text."""
    try:
        with guarded():
            tokenizer = Tokenizer.from_str(source)
            # It may carry the settings of its training; they would cut or pad a prompt.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            _probe(tokenizer, _checked(tokenizer))
    except Exception as error:  # the only type that the Rust library raises
        raise PotexportError(f"{path} is no tokenizer: {one_line(error)}") from error
    return tokenizer


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A twin that reads special tokens as letters. PotexportError for one that cannot be written
    and read again, such as where two tokens have one id."""
    try:
        with guarded():
            twin = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:
        raise PotexportError(
            f"the tokenizer contradicts itself: {one_line(error)}; build the bundle again"
        ) from error
    twin.encode_special_tokens = True  # meaning: encode them like any other text
    return twin


@contextmanager
def guarded() -> Iterator[None]:
    """Makes a PotexportError of a panic, which is no Exception and would end a whole program."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PotexportError(f"the tokenizer gave up on this text: {one_line(error)}") from error


def _checked(tokenizer: Tokenizer) -> list[str]:
    """The patterns of a tokenizer. ValueError for those that can take time without end, and for
    replacements that grow."""
    patterns: list[str] = []
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        growth = 1
        for each in _dicts(json.loads(part.__getstate__())) if part else ():
            pattern, grown = each.get("Regex"), each.get("content")
            if isinstance(pattern, str):
                _check_pattern(pattern)
                patterns.append(pattern)
            growth *= max(1, len(grown)) if isinstance(grown, str) else 1
            if growth > MOST_GROWTH:
                raise ValueError(f"its replacements make over {MOST_GROWTH} characters of one")
    return patterns


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects within a value."""
    found = [value]
    while found:
        each = found.pop()
        if isinstance(each, dict):
            yield each
            found.extend(each.values())
        elif isinstance(each, list):
            found.extend(each)


CLASS = re.compile(r"\\.|\[(?:\\.|[^\[\]\\])*\]", re.DOTALL)
# An escape, a group's beginning or end, a repeat or any other character.
PART = re.compile(
    r"\\[pPxuok][{<][^}>]*[}>]|\\.|\(\?[<!=:>#a-zA-Z&~|-]*|[*+?][+?]?|\{\d*,?\d*\}[+?]?|.",
    re.DOTALL,
)
MANY = 8  # a number of repeats that counts like any number


def _check_pattern(pattern: str) -> None:
    """ValueError for a pattern whose repeats lie within repeats or follow each other in numbers,
    for a backtracking search tries all of their combinations; and for one that refers back or
    calls itself."""
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has a pattern of {len(pattern)} characters")
    plain, before = pattern, ""
    while plain != before:  # a class may hold classes
        before = plain
        plain = CLASS.sub(lambda found: found[0] if found[0][0] == "\\" else "x", plain)
    parts = iter(PART.findall(plain))
    while _repeats(parts, outermost=True) is None:  # an end of a group too many
        pass


def _repeats(parts: Iterator[str], *, outermost: bool = False) -> int | None:
    """Repeats in a row, at most, in the group that has begun; reads to its end. None where the
    outermost ends before the pattern does."""
    most = row = inner = 0
    for part in parts:
        if part == ")":
            return None if outermost else most
        if part == "|":
            row = inner = 0
        elif _is_repeat(part):
            if inner:
                raise ValueError("it has a pattern whose repeats lie within repeats")
            row += 1
        elif part.startswith("("):
            if part.startswith("(?") and part[2:3] in "&PR~|":
                raise ValueError("it has a pattern that calls itself")
            inner = _repeats(parts) or 0
            row += inner
        elif part.startswith("\\") and part[1:2] in "123456789gk":
            raise ValueError("it has a pattern that refers back")
        else:
            inner = 0
        most = max(most, row)
        if most > MOST_REPEATS:
            raise ValueError(f"it has a pattern with more than {MOST_REPEATS} repeats in a row")
    return most


def _is_repeat(part: str) -> bool:
    if part.startswith("{"):
        numbers = part.strip("{}+?").split(",")
        return not numbers[-1] or int(numbers[-1][:9]) > MANY
    return part[0] in "*+"


def _probe(tokenizer: Tokenizer, patterns: list[str]) -> None:
    """ValueError for a tokenizer that takes long where a character is repeated, and what is behind
    fits no pattern, though all that a pattern asks for is there."""
    tried = list(dict.fromkeys(COMMON + "".join(patterns)))[:MOST_PROBED]
    behind = "\0" + "".join(tried)
    for character in tried if patterns else ():
        for length in PROBES:
            started = time.monotonic()
            tokenizer.encode(character * length + behind, add_special_tokens=False)
            if time.monotonic() - started > MOST_SECONDS:
                raise ValueError(f"it takes too long for {length} times {character!r}")
