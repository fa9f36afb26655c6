"""Safetensors files: eight bytes of the header's length, the header in JSON, the data.

The package that reads and writes them is not among what a phone needs, and the format is this page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from potexport import strict
from potexport.errors import PotexportError
from potexport.runtime.backend import Array
from potexport.spec import ITEM_BYTES, TensorSpec

DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LARGEST_HEADER = 64 << 20  # bytes; a thousand weights take some hundred thousand
Entries = dict[str, dict[str, Any]]


def entries(tensors: Iterable[TensorSpec]) -> Entries:
    """What a header says of them, in the file's order: the widest types first, so that all lie
    where their type wants them."""
    found: Entries = {}
    first = 0
    for each in sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]):
        offsets = [first, first + each.bytes]
        kind, shape = NAMES[each.dtype], list(each.shape)
        found[each.name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        first = offsets[1]
    return found


def header(tensors: Entries, metadata: Mapping[str, str]) -> bytes:
    """All that stands before the data, which begins at a multiple of eight bytes."""
    text = json.dumps({METADATA: dict(metadata), **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def arrays(tensors: Entries, data: Array) -> dict[str, Array]:
    """Name -> array over the bytes of `data`, (n,) uint8."""
    return {
        name: data[first:last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in tensors.items()
        for first, last in [entry["data_offsets"]]
    }


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


def _checked(name: str, given: Any, size: int) -> _Entry:
    """What a header says of a tensor, if the file, of `size` bytes of data, has it."""
    entry = strict.made(_Entry, given, name[:40])
    if not strict.is_plain(name) or entry.dtype not in DTYPES or min(entry.shape, default=1) < 0:
        raise ValueError(f"{name[:40]!r} is of a type or shape that no weight has")
    itemsize = np.dtype(DTYPES[entry.dtype]).itemsize
    if len(entry.data_offsets) != 2 or not 0 <= entry.data_offsets[0] <= size:
        raise ValueError(f"{name[:40]!r} lies outside of the file")
    first, last = entry.data_offsets
    if last > size or last - first != prod(entry.shape) * itemsize:
        raise ValueError(f"{name[:40]!r} lies outside of the file, or has another size")
    return entry


def _places(tensors: Entries) -> Iterable[tuple[int, int]]:
    return (each["data_offsets"] for each in tensors.values())


def map_weights(path: Path) -> dict[str, Array]:
    """Name -> array over the memory-mapped file."""
    try:
        with strict.regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"its header has {length} bytes")
            found = strict.loads(file.read(length))
            file.seek(0)
            raw: Any = np.memmap(file, np.uint8, "r")
        strict.made(dict[str, Any], found).pop(METADATA, None)
        data = raw[8 + length :]
        known = {name: asdict(_checked(name, each, data.size)) for name, each in found.items()}
        if sum(last - first for first, last in _places(known)) > data.size:
            raise ValueError("its tensors lie within each other")
        return arrays(known, data)
    except (OSError, ValueError, RecursionError) as error:
        raise PotexportError(
            f"{path} is not a readable safetensors file ({error}); build the bundle again"
        ) from error
