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

from potexport.errors import PotexportError

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "uint16": 2, "int32": 4, "int64": 8}
# Which of them a target takes, and with which type of pot, the target says; uint16 ones are codes
# (`potexport.quantize`).
PRECISIONS = ("fp32", "fp16", "a16w8", "w4")
QUANTIZED: Mapping[str, float] = {"a16w8": 1.0, "w4": 0.5625}  # bytes a weight, scales included
TRACED: Mapping[str, str] = {"a16w8": "float32"}  # traced in another type than the pot's
# Scores of policies stay below those of slots that must stay, in fp16 as well (`graphs.select`).
LARGEST: Mapping[str, int] = {"slots": 32768, "chunk": 4096, "catalyst_width": 2048}
MODEL_GRAPHS = ("prefill", "decode", "observe")
GRAPHS = (*MODEL_GRAPHS, "compress")
EMBEDDED = "inputs_embeds"  # takes the place of input_ids where the host looks embeddings up


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a decoder that its graphs depend on."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise PotexportError(
                f"{self.query_heads} query heads do not divide into {self.kv_heads} key/value "
                "heads; "
                "the model's config is inconsistent"
            )


@dataclass(frozen=True)
class PotGeometry:
    """The fixed sizes of one pot. `keep` is only the default of a run-time number."""

    slots: int
    chunk: int
    keep: int
    keep_max: int
    catalyst_width: int
    sink: int
    recent: int

    @property
    def positions(self) -> int:
        """Rows of the rotary tables: a full pot and the widest pass over it."""
        return self.slots + max(self.chunk, self.catalyst_width)

    def check(self) -> None:
        """Raise PotexportError, in one line, for numbers that cannot work together."""
        for name in ("slots", "chunk", "keep", "keep_max", "catalyst_width"):
            if getattr(self, name) < 1:
                raise PotexportError(
                    f"{option(name)} is {getattr(self, name)}; it must be at least 1"
                )
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                raise PotexportError(
                    f"{option(name)} is {getattr(self, name)}; it may be at most {most}"
                )
        for name in ("sink", "recent"):
            if getattr(self, name) < 0:
                raise PotexportError(
                    f"{option(name)} is {getattr(self, name)}; it must not be negative"
                )
        if self.slots < self.sink + self.recent + self.chunk:
            raise PotexportError(
                f"a pot of {self.slots} slots cannot hold {self.sink} sinks + {self.recent} recent "
                "+ a chunk of "
                f"{self.chunk}; give --pot at least {self.sink + self.recent + self.chunk} or a "
                "smaller --chunk"
            )
        room = self.slots - self.chunk
        for name in ("keep", "keep_max"):
            if getattr(self, name) > room:
                raise PotexportError(
                    f"{option(name)} {getattr(self, name)} leaves no room for a chunk of "
                    f"{self.chunk} in a pot of {self.slots} slots; give at most {room}"
                )
        if not self.sink + self.recent <= self.keep <= self.keep_max:
            raise PotexportError(
                f"--keep is {self.keep}; it must lie between sinks + recent "
                f"({self.sink + self.recent}) "
                f"and --keep-max ({self.keep_max})"
            )


def option(field: str) -> str:
    """The command-line option that sets a field of PotGeometry."""
    return "--pot" if field == "slots" else "--" + field.replace("_", "-")


def default_geometry(
    facts: ModelFacts,
    *,
    slots: int | None = None,
    chunk: int | None = None,
    keep: int | None = None,
    keep_max: int | None = None,
    catalyst_width: int | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> PotGeometry:
    """Fill in what was not asked for, from the model's context length, and check the whole.

    The pot is an eighth of the trained context, between 512 and 2,048 slots: large enough that most
    prompts are never compressed, small enough that a phone reads it at every token; half of a
    context shorter than that. Half of the pot is kept.
    """
    if slots is None:
        slots = min(max(facts.max_positions // 8, 512), 2048)
        if slots + 64 > facts.max_positions:  # a pot and the pass over it need positions
            slots = facts.max_positions // 2
    chunk = _or(chunk, min(64, max(slots // 4, 1)))
    sink, recent = _or(sink, min(4, slots // 8)), _or(recent, min(16, slots // 8))
    keep_max = _or(keep_max, max(slots - chunk, 1))
    geometry = PotGeometry(
        slots=slots,
        chunk=chunk,
        keep=_or(keep, min(max(slots // 2, sink + recent), keep_max)),
        keep_max=keep_max,
        catalyst_width=_or(catalyst_width, min(32, slots)),
        sink=sink,
        recent=recent,
    )
    geometry.check()
    if geometry.positions > facts.max_positions:
        raise PotexportError(
            f"a pot of {slots} slots and passes of {geometry.positions - slots} tokens need "
            f"{geometry.positions} positions, "
            f"but the model was trained on {facts.max_positions}; give a smaller --pot"
        )
    return geometry


def _or(asked: int | None, otherwise: int) -> int:
    """What was asked for, 0 included."""
    return otherwise if asked is None else asked


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


@dataclass(frozen=True)
class Layout:
    """Makes every tensor spec of a bundle from the model, the pot, the policy's needs and the float
    type."""

    facts: ModelFacts
    pot: PotGeometry
    needs: frozenset[str]
    dtype: str = "float32"

    def rows(self, prefix: str, width: int) -> Iterator[TensorSpec]:
        """Keys and values of `width` tokens, for each layer: the pot itself, new rows, or kept
        slots."""
        heads, size = self.facts.kv_heads, self.facts.head_size
        for layer in range(self.facts.layers):
            yield TensorSpec(f"{prefix}.{layer}.key", self.dtype, (1, heads, size, width))
            yield TensorSpec(f"{prefix}.{layer}.value", self.dtype, (1, heads, width, size))

    def past(self) -> tuple[TensorSpec, ...]:
        return tuple(self.rows("past_key_values", self.pot.slots))

    def per_slot(self, name: str, width: int, dtype: str = "float32") -> tuple[TensorSpec, ...]:
        """One number for each slot of each head of each layer; `{}` in the name is the layer."""
        shape = (self.facts.kv_heads, width)
        return tuple(
            TensorSpec(name.format(layer), dtype, shape) for layer in range(self.facts.layers)
        )

    def graphs(self) -> dict[str, GraphSpec]:
        """The graphs that this policy uses, by name; `observe` only where it scores by mass."""
        specs = [self._prefill(), self._decode()]
        if "mass" in self.needs:
            specs.append(self._observe())
        return {spec.name: spec for spec in (*specs, self._compress())}

    def memory(self) -> dict[str, int]:
        """Bytes of a session besides its weights: the pot with its scores, then each graph's own
        inputs and outputs."""
        needed = [name for name in ("mass", "novelty") if name in self.needs]
        scores = [spec for n in needed for spec in self.per_slot(n + ".{}", self.pot.slots)]
        pot = {spec.name: spec.bytes for spec in (*self.past(), *scores)}
        own = {
            name: sum(t.bytes for t in (*graph.inputs, *graph.outputs) if t.name not in pot)
            for name, graph in self.graphs().items()
        }
        return {"pot": sum(pot.values()), **own}

    def _prefill(self) -> GraphSpec:
        width = self.pot.chunk
        inputs = [_ids("input_ids", width)]
        outputs = [*self.rows("present", width)]
        if "novelty" in self.needs:
            inputs.append(_ids("next_ids", width))
            outputs.append(TensorSpec("novelty", "float32", (1, width)))
        return GraphSpec("prefill", (*inputs, _count("past_seq_len"), *self.past()), tuple(outputs))

    def _decode(self) -> GraphSpec:
        logits = TensorSpec("logits", "float32", (1, 1, self.facts.vocab_size))
        inputs = (_ids("input_ids", 1), _count("past_seq_len"), *self.past())
        return GraphSpec("decode", inputs, (logits, *self.rows("present", 1)))

    def _observe(self) -> GraphSpec:
        width = self.pot.catalyst_width
        weights = TensorSpec("query_weights", "float32", (width,))
        inputs = (_ids("input_ids", width), weights, _count("past_seq_len"), *self.past())
        return GraphSpec("observe", inputs, self.per_slot("mass.{}", self.pot.slots))

    def _compress(self) -> GraphSpec:
        slots, kept = self.pot.slots, self.pot.keep_max
        scores = [
            spec
            for name in ("mass", "novelty")
            if name in self.needs
            for spec in self.per_slot(name + ".{}", slots)
        ]
        inputs = (*scores, _count("past_seq_len"), _count("keep"), *self.past())
        # Not `novelty.N` again: no two values of a graph may share a name.
        carried = self.per_slot("present.{}.novelty", kept) if "novelty" in self.needs else ()
        outputs = (*self.rows("present", kept), *carried, *self.per_slot("kept.{}", kept, "int32"))
        return GraphSpec("compress", inputs, outputs)


def _ids(name: str, width: int) -> TensorSpec:
    return TensorSpec(name, "int32", (1, width))


def _count(name: str) -> TensorSpec:
    return TensorSpec(name, "int32", (1,))
