"""The graphs in ONNX Runtime, on the CPU.

Weights are mapped from the file and packed once for all graphs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.backend import Array
from potexport.runtime.bound import BoundBackend
from potexport.runtime.coded_pot import read_key_facts
from potexport.runtime.ort_capi import OrtCError, SharedSessions

SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

# Quantized graphs as they are written. Otherwise ONNX Runtime makes MatMulNBits of a product with
# int8 weights, which rounds its input to 8 bits: off by 200 of 65,536 steps where the HTP is by 1.
CONFIG = {"session.disable_quant_qdq": "1"}


class OnnxRuntimeBackend(BoundBackend):
    """Graphs of a bundle, as sessions that share their weights."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        graphs: Sequence[str],
        *,
        threads: int,
    ) -> None:
        weights = map_weights(Path(folder) / manifest.weights)
        files = {name: Path(folder) / f"{name}.onnx" for name in graphs}
        key_facts = read_key_facts(folder, manifest.layout)
        try:
            sessions = SharedSessions(threads=threads, weights=weights, config=CONFIG)
            super().__init__(manifest, sessions, files, key_facts=key_facts)
        except OrtCError as error:
            raise PotexportError(
                f"ONNX Runtime cannot load {folder}: {str(error).splitlines()[0]}"
            ) from error


def map_weights(path: Path) -> dict[str, Array]:
    """Name -> array over the memory-mapped safetensors file (8 bytes of header length, a JSON
    header, data)."""
    try:
        raw: Any = np.memmap(path, np.uint8, "r")
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:begin].tobytes())
        header.pop("__metadata__", None)
        return {
            name: raw[begin + first : begin + last]
            .view(SAFETENSORS_DTYPES[entry["dtype"]])
            .reshape(entry["shape"])
            for name, entry in header.items()
            for first, last in [entry["data_offsets"]]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PotexportError(
            f"{path} is not a readable safetensors file ({error}); build the bundle again"
        ) from error
