"""The graphs in ONNX Runtime, on the CPU.

Every input and output is bound once to an array that lives as long as the session, so that a step
allocates nothing: the pot's own arrays are the graphs' inputs. Weights are mapped from the file and
    packed once for all graphs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.backend import Array, padded
from potexport.runtime.ort_capi import OrtCError, SharedSessions
from potexport.runtime.pot import Pot
from potexport.spec import GraphSpec

SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}


class OnnxRuntimeBackend:
    """All graphs of a bundle, as sessions that share their weights."""

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int) -> None:
        self.manifest = manifest
        self.pot = Pot(manifest.layout)
        weights = map_weights(Path(folder) / manifest.weights)
        try:
            self._sessions = SharedSessions(threads=threads, weights=weights)
            self._graphs = {
                name: _Graph(self._sessions, Path(folder) / f"{name}.onnx", spec, self.pot)
                for name, spec in manifest.graphs.items()
            }
        except OrtCError as error:
            raise PotexportError(
                f"ONNX Runtime cannot load {folder}: {str(error).splitlines()[0]}"
            ) from error

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        graph = self._graphs["prefill"]
        padded(graph.arrays["input_ids"], ids)
        novelty = np.zeros(ids.size + 1, np.float32)
        if "next_ids" in graph.arrays:
            padded(graph.arrays["next_ids"], next_ids)
        graph.run(self.pot.fill)
        # Embeddings are looked up in the mapped file; without this, memory would grow with the
        # number of different words read. What is needed again comes from the page cache.
        self._sessions.drop_pages()
        if "novelty" in graph.arrays:
            novelty[0] = first_novelty
            novelty[1:] = graph.arrays["novelty"][0, : ids.size]
        self.pot.append(graph.keys, graph.values, novelty[:-1], ids.size)
        return float(novelty[-1])

    def decode(self, token: int, novelty: float) -> Array:
        graph = self._graphs["decode"]
        graph.arrays["input_ids"][0, 0] = token
        graph.run(self.pot.fill)
        self.pot.append(graph.keys, graph.values, novelty, 1)
        logits: Array = graph.arrays["logits"][0, 0]
        return logits

    def observe(self, ids: Array) -> None:
        graph = self._graphs["observe"]
        padded(graph.arrays["input_ids"], ids)
        graph.arrays["query_weights"][:] = np.arange(graph.arrays["query_weights"].size) < ids.size
        graph.run(self.pot.fill)

    def compress(self, keep: int) -> list[Array]:
        graph = self._graphs["compress"]
        graph.arrays["keep"][0] = keep
        self._sessions.drop_pages()  # of words generated since the last prefill
        graph.run(self.pot.fill)
        self.pot.replace(graph.keys, graph.values, graph.per_layer("present.{}.novelty"), keep)
        return [kept[:, :keep] for kept in graph.per_layer("kept.{}")]

    def close(self) -> None:
        self._sessions.close()


class _Graph:
    """One graph with all of its inputs and outputs bound: the pot's arrays, and buffers of its own
    for the rest."""

    def __init__(self, sessions: SharedSessions, path: Path, spec: GraphSpec, pot: Pot) -> None:
        session = sessions.load(path)
        declared = {**session.inputs, **session.outputs}
        for tensor in (*spec.inputs, *spec.outputs):
            if declared.pop(tensor.name, None) != (tensor.dtype, tensor.shape):
                raise PotexportError(
                    f"{path.name} does not have {tensor}, which the manifest declares; build the "
                    "bundle again"
                )
        if declared:
            raise PotexportError(
                f"{path.name} has {sorted(declared)}, which the manifest does not; build the "
                "bundle again"
            )
        self.arrays: dict[str, Array] = {}
        self._binding = session.binding()
        self._layers = len(pot.keys)
        for tensor in spec.inputs:
            array = _of_pot(pot, tensor.name)
            array = np.zeros(tensor.shape, tensor.dtype) if array is None else array
            self.arrays[tensor.name] = array
            self._binding.bind_input(tensor.name, array)
        outputs = {}
        for tensor in spec.outputs:
            array = _of_pot(pot, tensor.name) if spec.name == "observe" else None
            outputs[tensor.name] = np.zeros(tensor.shape, tensor.dtype) if array is None else array
            self._binding.bind_output(tensor.name, outputs[tensor.name])
        self.arrays |= outputs
        self.keys = self.per_layer("present.{}.key")
        self.values = self.per_layer("present.{}.value")

    def per_layer(self, name: str) -> list[Array]:
        """The tensors of this name, with `{}` for the layer; none where the graph does not have
        them."""
        names = (name.format(layer) for layer in range(self._layers))
        return [self.arrays[each] for each in names if each in self.arrays]

    def run(self, fill: int) -> None:
        self.arrays["past_seq_len"][0] = fill
        self._binding.run()


def _of_pot(pot: Pot, name: str) -> Array | None:
    """The pot's array behind a tensor of the contract, None for tensors that are not the pot's."""
    kind, *rest = name.split(".")
    if kind == "past_key_values":
        layer = int(rest[0])
        return pot.keys[layer] if rest[1] == "key" else pot.values[layer]
    per_slot = {"mass": pot.mass, "novelty": pot.novelty}.get(kind) if rest else None
    return per_slot[int(rest[0])] if per_slot else None


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
