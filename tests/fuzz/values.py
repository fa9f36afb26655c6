"""Changes of JSON documents and of bytes, all from one `random.Random`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (-1, 0, 1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30)
FLOATS = (0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", " ", "..", "../weights.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "\0", "\ud800",
    "\x1b[2J", "x" * 3000, "é한🙂", "decode.onnx", "compress", "compress_x", "float32", "int8",
    "uint16", "prefill", "²", "%s%n", "{0}",
)  # fmt: skip


def strange(chance: random.Random) -> Any:
    """Any value that JSON can hold, most of them where nobody expects it."""
    pick = chance.randrange(9)
    if pick == 0:
        return chance.choice((None, True, False))
    if pick in (1, 2):
        return chance.choice(NUMBERS)
    if pick == 3:
        return chance.choice(FLOATS)
    if pick == 4:
        return [] if chance.random() < 0.5 else {}
    if pick == 5:
        return nested(chance.choice((3, 100, 900)))
    if pick == 6:
        return [chance.choice(NUMBERS)] * chance.choice((1, 3, 1000, 100_000))
    return chance.choice(TEXTS)


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def change(document: Any, chance: random.Random) -> Any:
    """The document with one change at a random place; changes it in place where it can."""
    holder, key = _place(document, chance)
    if holder is None:
        return strange(chance)
    pick: Callable[[Any, Any, random.Random], None] = chance.choice(
        (_replace, _replace, _near, _near, _remove, _swap, _double, _rename)
    )
    pick(holder, key, chance)
    return document


def _place(document: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container within the document and one of its keys; (None, None) for the whole."""
    holder, key, at = None, None, document
    while isinstance(at, (dict, list)) and at and (holder is None or chance.random() < 0.85):
        holder = at
        key = chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at))
        at = holder[key]
    return holder, key


def _replace(holder: Any, key: Any, chance: random.Random) -> None:
    holder[key] = strange(chance)


def _near(holder: Any, key: Any, chance: random.Random) -> None:
    """A value of the same type, off by a little or a lot."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        moves = (value + 1, value - 1, -value, value * 2, value * 1000, value << 20, value + 0.5)
        holder[key] = chance.choice(moves)
    elif isinstance(value, str) and value:
        at = chance.randrange(len(value))
        more = chance.choice(("", "\0", "/", "x" * 1000, value, "\ud800", "\n"))
        holder[key] = value[:at] + more + value[at + 1 :]
    else:
        holder[key] = strange(chance)


def _remove(holder: Any, key: Any, chance: random.Random) -> None:
    del holder[key]


def _swap(holder: Any, key: Any, chance: random.Random) -> None:
    other = (
        chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    )
    holder[key], holder[other] = holder[other], holder[key]


def _double(holder: Any, key: Any, chance: random.Random) -> None:
    if isinstance(holder, list):
        times = chance.choice((1, 1, 2, 1000))
        # Of a list that is long itself the fuzzer would write gigabytes.
        holder.extend([holder[key]] * (1 if isinstance(holder[key], (dict, list)) else times))
    else:
        holder[f"{key}_"] = holder[key]


def _rename(holder: Any, key: Any, chance: random.Random) -> None:
    if isinstance(holder, dict):
        holder[chance.choice(TEXTS)] = holder.pop(key)
    else:
        holder.insert(chance.randrange(len(holder) + 1), strange(chance))


def dumped(document: Any, chance: random.Random) -> bytes:
    """As JSON, sometimes with a name that stands twice."""
    text = json.dumps(document)
    if chance.random() < 0.03 and text.startswith("{"):
        text = '{"model": {}, "pot": 1, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with flipped bits, a part cut out, repeated or put elsewhere, or an end cut off."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        if not made:
            break
        at = chance.randrange(len(made))
        size = min(chance.choice((1, 2, 4, 8, 64, 1000)), len(made) - at)
        pick = chance.randrange(8)
        if pick <= 2:
            made[at] ^= 1 << chance.randrange(8)
        elif pick == 3:
            made[at : at + size] = chance.randbytes(size)
        elif pick == 4:
            del made[at : at + size]
        elif pick == 5:
            made[at:at] = made[at : at + size]
        elif pick == 6:
            made[at : at + size] = b"\xff" * size
        elif chance.random() < 0.3:
            del made[at:]
    return bytes(made)
