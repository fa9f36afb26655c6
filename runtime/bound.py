"""The graphs of a bundle with every input and output bound once, whatever runs them.

Arrays live as long as the session, so that a step allocates nothing: the pot's own arrays are the
graphs' inputs. This file knows the contract of the graphs; what opens and runs a file is a
`Runner`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.runtime.backend import Array, kept_counts, moved_back, padded
from potexport.runtime.coded_pot import CodedPot, KeyFacts, make_pot
from potexport.runtime.pot import Pot
from potexport.runtime.rows_pot import RowsPot
from potexport.spec import EMBEDDED, MODEL_GRAPHS, GraphSpec, choosing


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
        key_facts: KeyFacts | None = None,
    ) -> None:
        """files: of each graph to open. table: (V, E), where the graphs take rows of the embedding
        instead of token ids. key_facts: see `make_pot`."""
        self.manifest, self._runner = manifest, runner
        self._table, self._key_facts = table, key_facts
        self._loaded = {}
        for name, path in files.items():
            spec = manifest.graphs[name]
            if table is not None:
                spec = spec.with_embeddings(table.shape[1], table.dtype.name)
            self._loaded[name] = _checked(runner.load(path), path, spec), spec
        self._bind(manifest.policy, {})

    def _bind(self, policy: PolicyFacts, outputs: Mapping[str, dict[str, Array]]) -> None:
        """Bind all graphs to an empty pot. outputs: of graphs that write to another's."""
        self.policy = policy
        self.pot = make_pot(self.manifest.layout, self._key_facts)
        self._graphs = {
            name: BoundGraph(loaded, spec, self.pot, self._table, outputs.get(name, {}))
            for name, (loaded, spec) in self._loaded.items()
        }

    def fork(self) -> BoundBackend:
        twin = copy.copy(self)
        # What a compression returns is nearly a pot, and is in the pot before anybody runs again.
        names = (name for name in self._graphs if name.startswith("compress"))
        twin._bind(self.policy, {name: self._graphs[name].outputs for name in names})
        return twin

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        graph = self._graphs["prefill"]
        graph.give(ids)
        novelty = np.zeros(ids.size + 1, np.float32)
        if "next_ids" in graph.arrays:
            padded(graph.arrays["next_ids"], next_ids)
        graph.weigh(ids.size)
        graph.run(self.pot)
        # Embeddings are looked up in the mapped file; without this, memory would grow with the
        # number of different words read. What is needed again comes from the page cache.
        self._runner.drop_pages()
        if "novelty" in graph.arrays:
            novelty[0] = first_novelty
            novelty[1:] = graph.arrays["novelty"][0, : ids.size]
        self._append(graph, novelty[:-1], ids.size)
        return float(novelty[-1])

    def decode(self, token: int, novelty: float) -> Array:
        graph = self._graphs["decode"]
        graph.give(np.array([token]))
        graph.weigh(1)
        graph.run(self.pot)
        self._append(graph, novelty, 1)
        logits: Array = graph.arrays["logits"][0, 0]
        return logits

    def _append(self, graph: BoundGraph, novelty: Array | float, count: int) -> None:
        if graph.new_mass:
            self.pot.receive(graph.mass, graph.new_mass, count)
        self.pot.append(graph.keys, graph.values, novelty, count)

    def observe(self, ids: Array, *, back: int = 0, into: str = "mass") -> None:
        graph = self._graphs["observe"]
        graph.give(ids)
        graph.weigh(ids.size)
        graph.run(self.pot, back=back)
        for scores, mass in zip(self.pot.scores[into], graph.mass, strict=True):
            scores[...] = mass

    def compress(self, keep: int, *, reset: bool = True) -> list[Array]:
        # Where nothing turns, the host can move rows itself.
        by_host = isinstance(self.pot, RowsPot) and not reset
        whole = self.policy.graph
        graph = self._graphs[choosing(whole) if by_host else whole]
        counts = kept_counts(self.pot, self.manifest.pot, keep)
        graph.arrays["keep"][:] = counts
        if isinstance(self.pot, CodedPot):
            graph.arrays["keep_coded"][:] = self.pot.coded(counts)
        graph.arrays["pinned"][0] = self.pot.pinned
        if "reset" in graph.arrays:
            graph.arrays["reset"][0] = reset
        if "back" in graph.arrays:
            graph.arrays["back"][0] = moved_back(self.pot, counts, reset=reset)
        self._runner.drop_pages()  # of words generated since the last prefill
        graph.run(self.pot)
        kept = graph.per_layer("kept.{}")
        if isinstance(self.pot, RowsPot) and not reset:
            self.pot.keep(kept, counts)
        else:
            self.pot.replace(
                graph.per_layer("present.{}.key", self.pot.chosen),
                graph.values,
                kept,
                counts,
                reset=reset,
                coded=graph.coded,
                last=graph.per_layer("present.{}.key", self.pot.windowed),
            )
        sizes = self.pot.counts_of(counts)
        return [slots[:, :count] for slots, count in zip(kept, sizes, strict=True)]

    def close(self) -> None:
        self._runner.close()


def _checked(loaded: Loaded, path: Path, spec: GraphSpec) -> Loaded:
    """PotexportError unless the file declares what the manifest does."""
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
    return loaded


class BoundGraph:
    """One graph with all of its inputs and outputs bound: the pot's arrays, and buffers of its own
    for the rest."""

    def __init__(
        self,
        loaded: Loaded,
        spec: GraphSpec,
        pot: Pot,
        table: Array | None,
        outputs: Mapping[str, Array],
    ) -> None:
        """outputs: to write to; the pot's own, or buffers, where there is none."""
        self._table = table
        self.arrays: dict[str, Array] = {}
        self._seen = pot.output
        self._binding = loaded.binding()
        self._layers = range(len(pot.keys))
        self._chosen = {layer: number for number, layer in enumerate(pot.chosen)}
        for tensor in spec.inputs:
            array = self._of_pot(pot, tensor.name)
            array = np.zeros(tensor.shape, tensor.dtype) if array is None else array
            self.arrays[tensor.name] = array
            self._binding.bind_input(tensor.name, array)
        # Not the pot's, though some have the names of its scores; but where it is written in place.
        self.outputs: dict[str, Array] = {}
        for tensor in spec.outputs:
            array = outputs.get(tensor.name)
            if spec.name in MODEL_GRAPHS:
                array = pot.held.get(tensor.name.replace("present", "past_key_values"))
            array = np.zeros(tensor.shape, tensor.dtype) if array is None else array
            self._binding.bind_output(tensor.name, array)
            self.outputs[tensor.name] = array
        self.arrays |= self.outputs
        self.keys = self.per_layer("present.{}.key")
        self.values = self.per_layer("present.{}.value")
        names = ("present_codes.{}.key", "present_codes.{}.value",
                 "present_scales.{}.key", "present_scales.{}.value")  # fmt: skip
        self.coded = list(zip(*map(self.per_layer, names), strict=True))
        self.mass, self.new_mass = self.per_layer("mass.{}"), self.per_layer("new_mass.{}")

    def per_layer(self, name: str, layers: Sequence[int] | None = None) -> list[Array]:
        """The outputs of this name, with `{}` for the layer, of all layers or of these; none where
        the graph does not have them."""
        names = (name.format(layer) for layer in (self._layers if layers is None else layers))
        return [self._seen(self.outputs[each], each) for each in names if each in self.outputs]

    def give(self, ids: Array) -> None:
        """Set the tokens of the next run, fewer than the graph's width or as many."""
        if self._table is None:
            padded(self.arrays["input_ids"], ids)
            return
        rows = self.arrays[EMBEDDED][0]
        rows[: ids.size] = self._table[ids]
        rows[ids.size :] = self._table[0]  # what is padded is masked, but must be finite

    def weigh(self, count: int) -> None:
        """Let the first `count` tokens of the next run count in the attention that it returns."""
        if "query_weights" in self.arrays:
            self.arrays["query_weights"][:] = np.arange(self.arrays["query_weights"].size) < count

    def run(self, pot: Pot, *, back: int = 0) -> None:
        """Over a pot, or over all but its last `back` slots."""
        pot.ready()
        np.maximum(pot.fills - back, 0, out=self.arrays["past_seq_len"])
        if "position" in self.arrays:
            self.arrays["position"][0] = pot.position - back
        self._binding.run()

    def _of_pot(self, pot: Pot, name: str) -> Array | None:
        """The pot's array behind a tensor of the contract, None for tensors that are not the
        pot's."""
        if name in pot.held:
            return pot.held[name]
        kind, *rest = name.split(".")
        if kind == "past_key_values":
            layer = int(rest[0])
            return pot.keys[layer] if rest[1] == "key" else pot.values[layer]
        if not rest:
            return None
        per_slot = pot.positions if kind == "positions" else pot.scores.get(kind)
        return per_slot[self._chosen[int(rest[0])]] if per_slot else None
