"""What rendering one chat template may use: time, and memory within any one operation and in all.

The meter knows nothing of jinja2 but its SecurityError; `template.py` decides where it is asked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError

MAX_CHARS = 8_000_000  # of a rendered prompt; no phone's pot is fed more through a template
MAX_MADE = 10  # times as many characters are made on the way, of all values together
MAX_PARTS = 200_000  # of a list in a list and so on, each counted as often as it would be printed
MAX_SECONDS = 3.0  # of rendering; a real template takes milliseconds
MAX_WIDTH = 100_000  # of padding, and jinja2's own limit for range()
NUMBER = re.compile(r"\d+")
MAX_DATE = 1_000  # characters of a pattern; each makes a few dozen at most
DATE_WIDTH = re.compile(r"%[^A-Za-z%]*\d")


class Meter:
    """Of one rendering."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._made = 0

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS:g} s")

    def count(self, value: Any) -> Any:
        """Take note of a value that was made, which is returned."""
        self.tick()
        self._made += weight(value)
        if self._made > MAX_MADE * MAX_CHARS:
            raise SecurityError(f"it made more than {MAX_MADE * MAX_CHARS:,} characters in all")
        return value


_meter: ContextVar[Meter | None] = ContextVar("_meter", default=None)


def begin() -> Any:
    """Start to count; the result is for `end`."""
    return _meter.set(Meter())


def end(begun: Any) -> None:
    _meter.reset(begun)


def tick() -> None:
    if meter := _meter.get():
        meter.tick()


def made(value: Any) -> Any:
    """The value, counted and within its limits."""
    meter = _meter.get()
    return meter.count(value) if meter else value


def weight(value: Any) -> int:
    """How many characters a value has, as it would be printed, and one for each of its parts; a
    whole number grows by its bits. SecurityError where there are too many."""
    if isinstance(value, str):
        return check_size(len(value))
    if isinstance(value, int):
        return check_size(value.bit_length())
    total = parts = 0
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif isinstance(each, Mapping):
            waiting.extend(each.keys())
            waiting.extend(each.values())
        parts += 1
        if parts + len(waiting) > MAX_PARTS:
            raise SecurityError(f"it made a list of more than {MAX_PARTS:,} parts")
        check_size(total)
    return total + parts


def check_size(size: int) -> int:
    if size > MAX_CHARS:
        raise SecurityError(f"it made more than {MAX_CHARS:,} characters")
    return size


def check_widths(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > MAX_WIDTH:
            raise SecurityError(f"it asked for a width of {value}")


def check_format(form: str, given: Any) -> None:
    """Before `form` is filled in with what is given, once for each of its fields."""
    widths = [int(digits[:9]) for digits in NUMBER.findall(form)]
    widths += [each for each in _flat(given) if isinstance(each, int)]
    check_widths(widths, {})
    fields = form.count("{") + form.count("%")
    check_size(len(form) + fields * (weight(given) + max(widths, default=0)))


def check_fields(form: str) -> None:
    """Before `str.format`: a width that is itself filled in is in no real template, and may come
    from anywhere."""
    with suppress(ValueError):  # what is no format is told by `format` itself
        if any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(form)):
            raise SecurityError("it asked for a width that is filled in")


def check_date(pattern: object) -> None:
    """Before `strftime`, where glibc takes a width before each letter."""
    if isinstance(pattern, str):
        if len(pattern) > MAX_DATE:
            raise SecurityError(f"it asked for a date of more than {MAX_DATE:,} characters")
        if DATE_WIDTH.search(pattern):
            raise SecurityError("it asked for a width of a date")


def _parts(value: Any) -> int:
    """How many a value has that can be gone through; nobody knows of a generator."""
    return len(value) if isinstance(value, (str, list, tuple, Mapping)) else MAX_PARTS


def _flat(given: Any) -> list[Any]:
    if isinstance(given, Mapping):
        return list(given.values())
    return list(given) if isinstance(given, (list, tuple)) else [given]


def check_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a method of a string is called."""
    check_widths(args, kwargs)
    values = (*args, *kwargs.values())
    if name == "replace" and values and isinstance(values[0], str):
        check_size(len(text) + text.count(values[0]) * max(map(weight, values[1:]), default=0))
    elif name == "join":
        for each in values:
            check_size(weight(each) + _parts(each) * len(text))
    elif name == "translate":
        check_size(len(text) * max((weight(each) for each in values), default=1))
    elif name == "expandtabs":
        widths = [each for each in values if isinstance(each, int)]
        check_size(len(text) + text.count("\t") * max(widths, default=8))


def check_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before a filter is applied to `value`."""
    check_widths(args, kwargs)
    given = (*args, *kwargs.values())
    longest = max((len(each) for each in given if isinstance(each, str)), default=0)
    if name == "join":
        check_size(_parts(value) * longest)
    if not isinstance(value, str):
        return
    if name == "format":
        check_format(value, list(given))
    elif name == "replace":
        check_method(value, name, args, kwargs)
    elif name == "indent":
        widths = [each for each in given if isinstance(each, int)]
        check_size(len(value) + (value.count("\n") + 1) * max(longest, *widths, 4))
    elif name == "wordwrap":
        check_size(len(value) * (longest + 1))
