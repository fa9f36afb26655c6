"""What a pot and its four graphs are, as numbers and names.

This file decides every shape of the project; it computes nothing and imports only the standard
library, so that the build, the bundle and the on-device runtime read the same words.
`docs/graphs.md` tells the same in prose.

Letters: L layers, Hq query heads, Hkv key/value heads, D head size, M slots of the pot, T tokens of
a chunk, P catalyst width, K keep_max, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod

from potexport.coding import BITS, FLOATS, Coding
from potexport.geometry import ModelFacts, PotGeometry

ITEM_BYTES: Mapping[str, int] = {
    "float32": 4, "float16": 2, "uint16": 2, "int32": 4, "int64": 8, "int8": 1
}  # fmt: skip
# Which of them a target takes, and with which type of pot, the target says; uint16 ones are codes
# (`potexport.quantize`).
PRECISIONS = ("fp32", "fp16", "a16w8", "w8", "w4-w8", "w4")
QUANTIZED: Mapping[str, float] = {
    "a16w8": 1.0,
    "w8": 1.125,
    "w4-w8": 1.75,
    "w4": 0.6875,
}  # bytes a weight, scales included
TRACED: Mapping[str, str] = {"a16w8": "float32"}  # traced in another type than the pot's
MODEL_GRAPHS = ("prefill", "decode", "observe")
EMBEDDED = "inputs_embeds"  # takes the place of input_ids where the host looks embeddings up


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: all of its shape is constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class GraphSpec:
    """The signature of one graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def with_embeddings(self, size: int, dtype: str) -> GraphSpec:
        """The same graph, given (1, width, size) rows of the embedding table instead of ids."""
        inputs = (
            TensorSpec(EMBEDDED, dtype, (*t.shape, size)) if t.name == "input_ids" else t
            for t in self.inputs
        )
        return replace(self, inputs=tuple(inputs))

    def to_json(self) -> dict[str, object]:
        return {
            "inputs": [asdict(t) for t in self.inputs],
            "outputs": [asdict(t) for t in self.outputs],
        }


# What a policy may need that the host keeps for each slot; the first two are of one compression,
# the others are carried with a slot as it moves.
PASSING = ("mass", "window")
CARRIED = ("novelty", "received")
SCORES = (*PASSING, *CARRIED)


@dataclass(frozen=True)
class Layout:
    """Makes every tensor spec of a bundle from the model, the pot, what its policies need and the
    float type.

    needs: of the first policy; others: (graph, needs) of each further one. pot_dtype: one of
        `coding.POT_DTYPES`, or empty for a pot of the float type. in_place: keys lie token by
        token, as values do, with room for a chunk behind the slots, and the model graphs write new
        rows into the pot: their outputs `present.*` are the memory of `past_key_values.*`.
    """

    facts: ModelFacts
    pot: PotGeometry
    needs: frozenset[str]
    dtype: str = "float32"
    others: tuple[tuple[str, frozenset[str]], ...] = ()
    pot_dtype: str = ""
    in_place: bool = False

    @property
    def coding(self) -> Coding | None:
        """How the pot is coded, if it is."""
        bits = BITS.get(self.pot_dtype)
        return Coding(bits, self.pot.sink, self.pot.recent) if bits else None

    @property
    def gathered(self) -> frozenset[str]:
        """What any of the policies needs."""
        return self.needs.union(*(needs for _, needs in self.others))

    @property
    def counts(self) -> int:
        """How many numbers say how full the pot is: one, or one a layer."""
        return 1 if self.pot.uniform else self.facts.layers

    @property
    def chosen(self) -> list[int]:
        """The layers that a policy chooses in."""
        return self.pot.chosen(self.facts.layers)

    @property
    def windowed(self) -> list[int]:
        """The others, which hold the last tokens alone."""
        return self.pot.windowed(self.facts.layers)

    def rows(self, prefix: str, width: int) -> Iterator[TensorSpec]:
        """Keys and values of `width` tokens, for each layer: new rows. Of a pot that is written in
        place all of it."""
        if self.in_place:
            return self._rows(prefix, self._slots, self.dtype)
        return self._rows(prefix, dict.fromkeys(range(self.facts.layers), width), self.dtype)

    def _rows(self, prefix: str, widths: dict[int, int], dtype: str) -> Iterator[TensorSpec]:
        """widths: by layer."""
        heads, size = self.facts.kv_heads, self.facts.head_size
        for layer, width in widths.items():
            by_token = (1, heads, width, size)
            key = by_token if self.in_place else (1, heads, size, width)
            yield TensorSpec(f"{prefix}.{layer}.key", dtype, key)
            yield TensorSpec(f"{prefix}.{layer}.value", dtype, by_token)

    def past(self) -> tuple[TensorSpec, ...]:
        """The pot itself, or the part of it that is in full precision."""
        return tuple(self._stored("past_key_values", self._slots))

    def codes(self) -> tuple[TensorSpec, ...]:
        """The rest of a coded pot: how many slots are codes, the centre and the spread of each
        channel of the keys, and each layer's codes with a scale a row."""
        if self.coding is None:
            return ()
        heads, size = self.facts.kv_heads, self.facts.head_size
        channels = TensorSpec("key_channels", self.dtype, (self.facts.layers, 2, heads, size))
        widths = [slots - self.coding.floats for slots in self._slots.values()]
        count = TensorSpec("past_coded", "int32", (self.counts,))
        return (count, channels, *self._coded("past", widths))

    @property
    def _slots(self) -> dict[int, int]:
        spare = self.pot.spare if self.in_place else 0
        return {layer: self.pot.slots_of(layer) + spare for layer in range(self.facts.layers)}

    def _stored(self, prefix: str, widths: dict[int, int]) -> Iterator[TensorSpec]:
        """Rows as the pot has them; of a coded one the columns in full precision."""
        if self.coding is not None:
            widths = dict.fromkeys(widths, self.coding.floats)
        return self._rows(prefix, widths, FLOATS.get(self.pot_dtype, self.dtype))

    def _coded(self, prefix: str, widths: list[int]) -> Iterator[TensorSpec]:
        """Of each layer: codes of keys and of values, scales of keys and of values."""
        assert self.coding is not None
        heads, packed = self.facts.kv_heads, self.coding.packed(self.facts.head_size)
        for layer, width in enumerate(widths):
            yield TensorSpec(f"{prefix}_codes.{layer}.key", "int8", (1, heads, packed, width))
            yield TensorSpec(f"{prefix}_codes.{layer}.value", "int8", (1, heads, width, packed))
            yield TensorSpec(f"{prefix}_scales.{layer}.key", self.dtype, (heads, width))
            yield TensorSpec(f"{prefix}_scales.{layer}.value", self.dtype, (heads, width))

    def per_slot(
        self, name: str, width: int | None = None, dtype: str = "float32"
    ) -> tuple[TensorSpec, ...]:
        """One number for each slot of each head of each layer that is chosen in, or for each of
        `width` tokens; `{}` in the name is the layer."""
        return tuple(
            TensorSpec(
                name.format(layer),
                dtype,
                (self.facts.kv_heads, self.pot.slots_of(layer) if width is None else width),
            )
            for layer in self.chosen
        )

    def graphs(self) -> dict[str, GraphSpec]:
        """The graphs that these policies use, by name; `observe` only where one scores by
        attention that takes a pass of its own."""
        specs = [self._prefill(), self._decode()]
        if self.gathered & set(PASSING):
            specs.append(self._observe())
        specs.append(self._compress("compress", self.needs))
        specs += [self._compress(name, needs) for name, needs in self.others]
        if self.in_place:
            squeezing = {"compress": self.needs, **dict(self.others)}
            specs += [self._choose(name, needs) for name, needs in squeezing.items()]
        return {spec.name: spec for spec in specs}

    def memory(self) -> dict[str, int]:
        """Bytes of a session besides its weights: the pot with its scores and positions, then each
        graph's own inputs and outputs."""
        needed = [name for name in SCORES if name in self.gathered]
        scores = [spec for name in needed for spec in self.per_slot(name + ".{}")]
        pot = {spec.name: spec.bytes for spec in (*self._held, *self.positions(), *scores)}
        own = {
            name: sum(
                t.bytes
                for t in (*graph.inputs, *graph.outputs)
                if t.name not in pot and not self.is_pot(name, t.name)
            )
            for name, graph in self.graphs().items()
        }
        return {"pot": sum(pot.values()), **own}

    def is_pot(self, graph: str, output: str) -> bool:
        """Whether an output of a graph is the pot itself."""
        return self.in_place and graph in MODEL_GRAPHS and output.startswith("present.")

    @property
    def _held(self) -> tuple[TensorSpec, ...]:
        """What the graphs read of the pot: keys and values, however they are kept."""
        return (*self.past(), *self.codes())

    @property
    def _read(self) -> tuple[TensorSpec, ...]:
        """The same for the model graphs, which turn keys that are codes to where they stand."""
        return (*self._held, *(self.positions() if self.coding else ()))

    def positions(self) -> tuple[TensorSpec, ...]:
        return self.per_slot("positions.{}", dtype="int32")

    def _fill(self) -> tuple[TensorSpec, ...]:
        """Where a pass over the pot begins, in slots and in positions."""
        return TensorSpec("past_seq_len", "int32", (self.counts,)), _count("position")

    def _received(self, width: int) -> tuple[TensorSpec, ...]:
        """What the slots and the tokens of a pass receive of its attention."""
        if "received" not in self.gathered:
            return ()
        return (*self.per_slot("mass.{}"), *self.per_slot("new_mass.{}", width))

    def _weights(self, width: int) -> tuple[TensorSpec, ...]:
        received = "received" in self.gathered
        return (TensorSpec("query_weights", "float32", (width,)),) if received else ()

    def _prefill(self) -> GraphSpec:
        width = self.pot.chunk
        inputs = [_ids("input_ids", width)]
        outputs = [*self.rows("present", width)]
        if "novelty" in self.gathered:
            inputs.append(_ids("next_ids", width))
            outputs.append(TensorSpec("novelty", "float32", (1, width)))
        rest = (*self._weights(width), *self._fill(), *self._read)
        return GraphSpec("prefill", (*inputs, *rest), (*outputs, *self._received(width)))

    def _decode(self) -> GraphSpec:
        logits = TensorSpec("logits", "float32", (1, 1, self.facts.vocab_size))
        inputs = (_ids("input_ids", 1), *self._weights(1), *self._fill(), *self._read)
        outputs = (logits, *self.rows("present", 1), *self._received(1))
        return GraphSpec("decode", inputs, outputs)

    def _observe(self) -> GraphSpec:
        width = self.pot.catalyst_width
        weights = TensorSpec("query_weights", "float32", (width,))
        inputs = (_ids("input_ids", width), weights, *self._fill(), *self._read)
        return GraphSpec("observe", inputs, self.per_slot("mass.{}"))

    def _compress(self, graph: str, needs: frozenset[str]) -> GraphSpec:
        scores = [spec for name in SCORES if name in needs for spec in self.per_slot(name + ".{}")]
        names = ("past_seq_len", "keep", *(("keep_coded",) if self.coding else ()))
        counts = [TensorSpec(name, "int32", (self.counts,)) for name in names]
        now = (_count("position"),) if "queries" in needs else ()
        back = (_count("back"),) if self.windowed else ()
        unread = {f"past_key_values.{layer}.value" for layer in self.windowed}
        held = (spec for spec in self._held if spec.name not in unread)
        asked = (_count("pinned"), *now, _count("reset"), *back)
        inputs = (*scores, *counts, *asked, *self.positions(), *held)
        most = {layer: self.pot.keep_max_of(layer) for layer in self.chosen}
        heads = self.facts.kv_heads
        kept = (TensorSpec(f"kept.{n}", "int32", (heads, m)) for n, m in most.items())
        rows = tuple(self._stored("present", most))
        if self.coding is not None:
            limits = zip(most.values(), self._slots.values(), strict=True)
            bodies = [max(self.coding.coded(count, slots), 1) for count, slots in limits]
            rows += tuple(self._coded("present", bodies))
        windowed = {layer: self.pot.slots_of(layer) for layer in self.windowed}
        last = (spec for spec in self._stored("present", windowed) if spec.name.endswith("key"))
        return GraphSpec(graph, inputs, (*rows, *last, *kept))

    def _choose(self, graph: str, needs: frozenset[str]) -> GraphSpec:
        """The part of a compression graph that says what is kept."""
        whole = self._compress(graph, needs)
        unread = {"reset"}
        for part in ("key", "value"):
            if f"{part}s" not in needs:
                unread |= {f"past_key_values.{layer}.{part}" for layer in self.chosen}
        if "keys" not in needs:
            unread |= {spec.name for spec in self.positions()}
        inputs = (spec for spec in whole.inputs if spec.name not in unread)
        kept = (spec for spec in whole.outputs if spec.name.startswith("kept."))
        return GraphSpec(choosing(graph), tuple(inputs), tuple(kept))


def choosing(graph: str) -> str:
    """The graph that only chooses, beside a compression graph."""
    return graph.replace("compress", "choose", 1)


def _ids(name: str, width: int) -> TensorSpec:
    return TensorSpec(name, "int32", (1, width))


def _count(name: str) -> TensorSpec:
    return TensorSpec(name, "int32", (1,))
