"""How large the pot of a model is, and which numbers can work together.

Standard library only, as `spec`, which makes tensors of it.

Letters: L layers, M slots of the pot, T tokens of a chunk, P catalyst width, K keep_max.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from potexport.errors import PotexportError

# Scores of policies stay below those of slots that must stay, in fp16 as well (`graphs.select`).
LARGEST: Mapping[str, int] = {"slots": 32768, "chunk": 4096, "catalyst_width": 2048}
LARGEST_POSITIONS = 1 << 20
POTS = 4  # full ones, that there are positions for unless asked otherwise (docs/quality.md)


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
        if self.kv_heads < 1 or self.query_heads % self.kv_heads:
            raise PotexportError(
                f"{self.query_heads} query heads do not divide into {self.kv_heads} key/value "
                "heads; "
                "the model's config is inconsistent"
            )


@dataclass(frozen=True)
class PotGeometry:
    """The fixed sizes of one pot. `keep` is only the default of a run-time number.

    positions: rows of the rotary tables. Kept tokens stay where they stood until the next ones
        would stand beyond; then a compression moves all to the front (context reset).
    layer_slots: slots of each layer, `slots` on average, or empty where all have the same.
    windows: of each layer how many tokens a query sees, itself included, or 0 where it sees all
        that the pot holds; empty where that is so in all layers. A layer with a window holds the
        last tokens and no others: it is never compressed, and no policy sees it.
    """

    slots: int
    chunk: int
    keep: int
    keep_max: int
    catalyst_width: int
    sink: int
    recent: int
    positions: int
    layer_slots: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()

    @property
    def widest(self) -> int:
        """Tokens of the widest pass over the pot."""
        return max(self.chunk, self.catalyst_width)

    @property
    def uniform(self) -> bool:
        """Whether one number says how full all layers are."""
        return not (self.layer_slots or self.windows)

    @property
    def spare(self) -> int:
        """Rows behind the slots of a pot that graphs write in place: they write padding too."""
        return self.chunk

    def window_of(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def chosen(self, layers: int) -> list[int]:
        """The layers that are compressed, of so many."""
        return [layer for layer in range(layers) if not self.window_of(layer)]

    def windowed(self, layers: int) -> list[int]:
        """The others."""
        return [layer for layer in range(layers) if self.window_of(layer)]

    def window_kept(self, layer: int) -> int:
        """How many of its last tokens a layer with a window keeps when it needs room: what any
        query may see, and before that the tokens that a policy may read once more."""
        return self.window_of(layer) + self.catalyst_width

    @property
    def shaped(self) -> bool:
        """Whether layers have pots of different sizes."""
        return bool(self.layer_slots)

    def more(self, layer: int) -> int:
        """How many slots more than `slots` a layer has, and keeps more than `keep`; may be
        negative."""
        return self.layer_slots[layer] - self.slots if self.layer_slots else 0

    def slots_of(self, layer: int) -> int:
        if self.window_of(layer):
            return self.window_kept(layer) + self.chunk
        return self.slots + self.more(layer)

    def keep_max_of(self, layer: int) -> int:
        return self.keep_max + self.more(layer)

    @property
    def smallest(self) -> int:
        """What the layer with the fewest slots has more than `slots`: 0 or less."""
        return min((each - self.slots for each in self.layer_slots), default=0)

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
        least = max((self.slots, *self.layer_slots)) + self.widest  # all behind the fullest layer
        if self.positions < least:
            raise PotexportError(
                f"--positions is {self.positions}; a pot of {self.slots} slots and passes of "
                f"{self.widest} tokens need at least {least}"
            )
        if self.positions > LARGEST_POSITIONS:
            raise PotexportError(
                f"--positions is {self.positions}; it may be at most {LARGEST_POSITIONS}"
            )
        self._check_shape()

    def _check_shape(self) -> None:
        total = self.slots * len(self.layer_slots)
        if sum(self.layer_slots) != total:
            raise PotexportError(
                f"the layers of --pot-shape have {sum(self.layer_slots)} slots together; "
                f"{len(self.layer_slots)} layers with --pot {self.slots} must have {total}"
            )
        least = self.keep + self.smallest
        if least < self.sink + self.recent:
            raise PotexportError(
                f"the smallest layer of --pot-shape has {self.slots + self.smallest} slots and "
                f"would keep {least}, fewer than sinks + recent ({self.sink + self.recent}); give "
                f"it at least {self.slots - self.keep + self.sink + self.recent}"
            )


def pyramid(slots: int, keep: int, forced: int, layers: int) -> tuple[int, ...]:
    """Slots of each layer, falling evenly from the first to the last, `slots` on average; the last
    keeps half of `keep`, or the `forced` ones if these are more.

    Source: arXiv 2406.02069 (PyramidKV), section 3: lower layers attend widely, upper ones to few.
    Differs: every layer has the same free room, so that all are full at the same token.
    """
    if layers < 2:
        return ()
    half = min(keep // 2, keep - forced)
    more = [round(half - 2 * half * layer / (layers - 1)) for layer in range(layers)]
    more[layers // 2] -= sum(more)  # what rounding left
    return tuple(slots + each for each in more)


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
    positions: int | None = None,
    layer_slots: tuple[int, ...] = (),
    windows: tuple[int, ...] = (),
    most_positions: int | None = None,
) -> PotGeometry:
    """Fill in what was not asked for, from the model's context length, and check the whole.

    The pot is an eighth of the trained context, between 512 and 2,048 slots: large enough that most
    prompts are never compressed, small enough that a phone reads it at every token; half of a
    context shorter than that. Half of the pot is kept. There are positions for four pots, but no
    more than `most_positions`, and where all layers have a window than these reach: it hides
    nothing then.

    windows: of each layer, as the model has them; empty if it has none.
    """
    limits = [facts.max_positions, *([most_positions] if most_positions else [])]
    limits += [min(windows)] if windows and all(windows) else []
    if slots is None:
        slots = min(max(facts.max_positions // 8, 512), 2048)
        if slots + 64 > min(limits):  # a pot and the pass over it need positions
            slots = min(limits) // 2
    chunk = _or(chunk, min(64, max(slots // 4, 1)))
    sink, recent = _or(sink, min(4, slots // 8)), _or(recent, min(16, slots // 8))
    keep_max = _or(keep_max, max(slots - chunk, 1))
    catalyst_width = _or(catalyst_width, min(32, slots))
    least = max((slots, *layer_slots)) + max(chunk, catalyst_width)
    positions = _or(positions, max(least, min(POTS * slots, *limits)))
    geometry = PotGeometry(
        slots=slots,
        chunk=chunk,
        keep=_or(keep, min(max(slots // 2, sink + recent), keep_max)),
        keep_max=keep_max,
        catalyst_width=catalyst_width,
        sink=sink,
        recent=recent,
        positions=positions,
        layer_slots=layer_slots,
        windows=_hiding(windows, positions),
    )
    geometry.check()
    _check_model(geometry, facts, windows, most_positions)
    return geometry


def _hiding(windows: tuple[int, ...], positions: int) -> tuple[int, ...]:
    """The windows that hide something from a query, among so many positions."""
    hiding = tuple(window if window < positions else 0 for window in windows)
    return hiding if any(hiding) else ()


def _check_model(
    pot: PotGeometry, facts: ModelFacts, windows: tuple[int, ...], most_positions: int | None
) -> None:
    """Raise PotexportError for positions that the model does not have, or has no use for."""
    fewer = " or fewer --positions" if pot.positions > pot.slots + pot.widest else ""
    takes = f"a pot of {pot.slots} slots and passes of {pot.widest} tokens take {pot.positions}"
    if pot.positions > facts.max_positions:
        raise PotexportError(
            f"{takes} positions, but the model was trained on {facts.max_positions}; give a "
            f"smaller --pot{fewer}"
        )
    if most_positions is not None and pot.positions > most_positions:
        raise PotexportError(
            f"{takes} positions, and beyond {most_positions} the model turns keys by other "
            f"frequencies; give a smaller --pot{fewer}"
        )
    if pot.windows and all(pot.windows):
        raise PotexportError(
            f"{takes} positions, but every layer looks back only {min(windows)} tokens, so that "
            f"what a compression keeps would not be seen; give a smaller --pot{fewer}"
        )
    if pot.windows and pot.layer_slots:
        raise PotexportError(
            "--pot-shape takes models whose layers all see the whole pot; "
            f"{len(pot.windowed(facts.layers))} of {facts.layers} layers have a sliding window: "
            "omit it"
        )


def _or(asked: int | None, otherwise: int) -> int:
    """What was asked for, 0 included."""
    return otherwise if asked is None else asked
