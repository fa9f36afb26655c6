"""The graphs in ONNX Runtime, on the CPU.

Weights are mapped from the file and packed once for all graphs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime import onnx_file
from potexport.runtime.bound import BoundBackend
from potexport.runtime.coded_pot import read_key_facts
from potexport.runtime.ort_capi import OrtCError, SharedSessions
from potexport.runtime.template import one_line
from potexport.runtime.tensors import map_weights

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
        scratch: int | None = None,
    ) -> None:
        """scratch: bytes of memory that graphs may use as they run, besides what is bound; any
        number by default."""
        for name in graphs:
            onnx_file.check(Path(folder) / f"{name}.onnx", manifest.weights)
        weights = map_weights(Path(folder) / manifest.weights)
        files = {name: Path(folder) / f"{name}.onnx" for name in graphs}
        key_facts = read_key_facts(folder, manifest.layout)
        try:
            sessions = SharedSessions(
                threads=threads, weights=weights, config=CONFIG, scratch=scratch
            )
            super().__init__(manifest, sessions, files, key_facts=key_facts)
        except OrtCError as error:
            raise PotexportError(f"ONNX Runtime cannot load {folder}: {one_line(error)}") from error
