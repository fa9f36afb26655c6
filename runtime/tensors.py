"""Safetensors files: eight bytes of the header's length, the header in JSON, the data.

The package that reads and writes them is not among what a phone needs, and the format is this page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


def map_weights(path: Path) -> dict[str, Array]:
    """Name -> array over the memory-mapped file."""
    try:
        raw: Any = np.memmap(path, np.uint8, "r")
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        found = json.loads(raw[8:begin].tobytes())
        found.pop(METADATA, None)
        return arrays(found, raw[begin:])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PotexportError(
            f"{path} is not a readable safetensors file ({error}); build the bundle again"
        ) from error
