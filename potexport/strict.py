"""Files of strangers, read as what they must be: no link, no pipe, no more bytes than agreed; JSON
without surprises; dataclasses whose every field has the type that it declares.

Standard library only, for the runtime uses it too. What is wrong is raised as ValueError, without
the file's name: the caller knows what it is for.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

# Python's objects take up to 25 times the bytes of the JSON they are made of: so many at most.
MOST_VALUES = 1 << 20
LARGEST_NUMBER = 1 << 53
LONGEST_STRING = 1 << 16
T = TypeVar("T")


def regular(path: str | os.PathLike[str]) -> BufferedReader:
    """The file, opened for reading. ValueError for what is none, such as a pipe or a device, which
    might never end or never open; OSError as `open`."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)  # noqa: SIM115  (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is no file")
    return file


def content(path: str | os.PathLike[str], most: int) -> bytes:
    """What is in a file of at most `most` bytes; ValueError where there are more."""
    with regular(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found


def text(path: str | os.PathLike[str], most: int) -> str:
    """The same, decoded; UnicodeDecodeError, which is a ValueError, for what is not UTF-8."""
    return content(path, most).decode("utf-8").replace("\r\n", "\n")


def loads(source: str | bytes, most: int = MOST_VALUES) -> Any:
    """JSON of at most `most` values, with no name twice, and no number that is not finite.

    Raises ValueError, RecursionError where it is nested too deeply.
    """
    words = source if isinstance(source, str) else source.decode("utf-8")
    if sum(map(words.count, ",[{")) > most:
        raise ValueError(f"it has more than {most} values")
    return json.loads(words, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{number[:40]} is not a finite number")
    return found


def made(kind: type[T], given: Any, where: str = "it") -> T:
    """`given`, parsed JSON, as a `kind`: a dataclass, a tuple or dict of any kind, an optional one,
    or a plain type. Nothing is converted: true is no 1, and 2.0 no 2.

    where: what a ValueError calls the value.
    """
    found: Any = _made(kind, given, where)
    return found  # type: ignore[no-any-return]


def _made(kind: Any, given: Any, where: str) -> Any:
    if kind is Any:
        return given
    if is_dataclass(kind):
        return _dataclass(kind, given, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (wanted,) = (each for each in arguments if each is not type(None))
        return None if given is None else _made(wanted, given, where)
    if origin is tuple:
        parts = _of(list, given, where)
        return tuple(_made(arguments[0], each, f"{where}[{n}]") for n, each in enumerate(parts))
    if origin is dict:
        items = _of(dict, given, where).items()
        return {name: _made(arguments[1], each, f"{where}.{name[:40]}") for name, each in items}
    if kind is float and type(given) is int:
        return float(_whole(given, where))
    if kind is int:
        return _whole(given, where)
    if kind is str and len(_of(str, given, where)) > LONGEST_STRING:
        raise ValueError(f"{where} has {len(given)} characters")
    return _of(kind, given, where)


def _of(kind: Any, given: Any, where: str) -> Any:
    if type(given) is not kind:
        raise ValueError(f"{where} is a {type(given).__name__}, not a {kind.__name__}")
    return given


def _whole(given: Any, where: str) -> int:
    whole: int = _of(int, given, where)
    if abs(whole) > LARGEST_NUMBER:
        raise ValueError(f"{where} is a number out of range")
    return whole


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Of a dataclass: name -> (type, whether it must be given)."""
    hints = get_type_hints(kind)
    return {
        each.name: (
            hints[each.name],
            each.default is MISSING and each.default_factory is MISSING,
        )
        for each in fields(kind)
    }


def _dataclass(kind: Any, given: Any, where: str) -> Any:
    known = _fields(kind)
    entries = _of(dict, given, where)
    if strange := sorted(set(entries) - set(known)):
        raise ValueError(f"{where} has {strange[0][:40]!r}, which is unknown")
    if missing := [n for n, (_, must) in known.items() if must and n not in entries]:
        raise ValueError(f"{where} has no {missing[0]}")
    return kind(**{n: _made(known[n][0], each, f"{where}.{n}") for n, each in entries.items()})


def words(document: Any) -> Iterator[str]:
    """Every name and text of a JSON document."""
    waiting = [document]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            waiting += each


def is_plain(words: str) -> bool:
    """Whether a terminal can be shown this: no control characters, and not endless."""
    return words.isprintable() and len(words) <= 1000


def is_file_in(folder: str | os.PathLike[str], name: str) -> bool:
    """Whether it is a file of the folder, and no link to another."""
    path = Path(folder) / name
    return path.is_file() and not path.is_symlink()
