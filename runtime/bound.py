"""The graphs of a bundle with every input and output bound once, whatever runs them.

Arrays live as long as the session, so that a step allocates nothing: the pot's own arrays are the
graphs' inputs. This file knows the contract of the graphs; what opens and runs a file is a
`Runner`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.backend import Array, padded
from potexport.runtime.pot import Pot
from potexport.spec import EMBEDDED, GraphSpec


class Binding(Protocol):
    """Arrays of the host for the inputs and outputs of one graph; they must stay where they are."""

    def bind_input(self, name: str, array: Array) -> None: ...
    def bind_output(self, name: str, array: Array) -> None: ...
    def run(self) -> None: ...


class Loaded(Protocol):
    """A graph that can run. inputs, outputs: name -> (dtype, shape), as the file declares them."""

    @property
    def inputs(self) -> Mapping[str, tuple[str, tuple[int, ...]]]: ...
    @property
    def outputs(self) -> Mapping[str, tuple[str, tuple[int, ...]]]: ...
    def binding(self) -> Binding: ...


class Runner(Protocol):
    """Opens graphs."""

    def load(self, path: Path) -> Loaded: ...
    def drop_pages(self) -> None:
        """Give back what was mapped from files and will hardly be read again."""

    def close(self) -> None: ...


class BoundBackend:
    """See `runtime.backend.Backend` for each method."""

    def __init__(
        self,
        manifest: Manifest,
        runner: Runner,
        files: Mapping[str, Path],
        *,
        table: Array | None = None,
    ) -> None:
        """files: of each graph of the manifest. table: (V, E), where the graphs take rows of the
        embedding instead of token ids."""
        self.manifest, self._runner = manifest, runner
        self.pot = Pot(manifest.layout)
        self._graphs = {}
        for name, spec in manifest.graphs.items():
            if table is not None:
                spec = spec.with_embeddings(table.shape[1], table.dtype.name)
            loaded = runner.load(files[name])
            self._graphs[name] = BoundGraph(loaded, files[name], spec, self.pot, table)

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        graph = self._graphs["prefill"]
        graph.give(ids)
        novelty = np.zeros(ids.size + 1, np.float32)
        if "next_ids" in graph.arrays:
            padded(graph.arrays["next_ids"], next_ids)
        graph.run(self.pot.fill)
        # Embeddings are looked up in the mapped file; without this, memory would grow with the
        # number of different words read. What is needed again comes from the page cache.
        self._runner.drop_pages()
        if "novelty" in graph.arrays:
            novelty[0] = first_novelty
            novelty[1:] = graph.arrays["novelty"][0, : ids.size]
        self.pot.append(graph.keys, graph.values, novelty[:-1], ids.size)
        return float(novelty[-1])

    def decode(self, token: int, novelty: float) -> Array:
        graph = self._graphs["decode"]
        graph.give(np.array([token]))
        graph.run(self.pot.fill)
        self.pot.append(graph.keys, graph.values, novelty, 1)
        logits: Array = graph.arrays["logits"][0, 0]
        return logits

    def observe(self, ids: Array) -> None:
        graph = self._graphs["observe"]
        graph.give(ids)
        graph.arrays["query_weights"][:] = np.arange(graph.arrays["query_weights"].size) < ids.size
        graph.run(self.pot.fill)

    def compress(self, keep: int) -> list[Array]:
        graph = self._graphs["compress"]
        graph.arrays["keep"][0] = keep
        self._runner.drop_pages()  # of words generated since the last prefill
        graph.run(self.pot.fill)
        self.pot.replace(graph.keys, graph.values, graph.per_layer("present.{}.novelty"), keep)
        return [kept[:, :keep] for kept in graph.per_layer("kept.{}")]

    def close(self) -> None:
        self._runner.close()


class BoundGraph:
    """One graph with all of its inputs and outputs bound: the pot's arrays, and buffers of its own
    for the rest."""

    def __init__(
        self, loaded: Loaded, path: Path, spec: GraphSpec, pot: Pot, table: Array | None
    ) -> None:
        declared = {**loaded.inputs, **loaded.outputs}
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
        self._table = table
        self.arrays: dict[str, Array] = {}
        self._binding = loaded.binding()
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

    def give(self, ids: Array) -> None:
        """Set the tokens of the next run, fewer than the graph's width or as many."""
        if self._table is None:
            padded(self.arrays["input_ids"], ids)
            return
        rows = self.arrays[EMBEDDED][0]
        rows[: ids.size] = self._table[ids]
        rows[ids.size :] = self._table[0]  # what is padded is masked, but must be finite

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
