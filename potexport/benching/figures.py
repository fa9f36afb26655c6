"""How figures are kept: medians with their quartiles, and one record for each party."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Spread:
    """The median of `count` measurements, and their quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        return cls.some(values) if values else None

    @classmethod
    def some(cls, values: Sequence[float]) -> Spread:
        few = len(values) < 2
        low, _, high = [values[0]] * 3 if few else quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high, len(values))


@dataclass
class Reading:
    """One party with so many tokens in its cache, or read by its pot. Seconds, bytes.

    open: to load the model. prompt: to read all of it, the likeliest next token included; where it
    takes minutes, once. decode: of one more token. curve: tokens read, seconds a token of the
    piece that ended there. compressing: share of the reading time that compressions took.
    peak: of the process, with all that Python imports. stopped: why there is no more of it.
    """

    tokens: int
    open: Spread | None = None
    prompt: Spread | None = None
    decode: Spread | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    compressing: float | None = None
    peak: int | None = None
    stopped: str = ""
    copy: Spread | None = None  # of the machine at the time, bytes a second
    products: Spread | None = None  # the same, floating-point operations a second


@dataclass
class Long:
    """One long reading: is its end as its beginning?

    late, early: seconds a token of its last pieces, and of the pieces of a new session's beginning,
    after its first compression, that took turns with them; `slower` is the median of their ratios.
    first_peak, last_peak: bytes of the process after `first` tokens, and at the end.
    """

    tokens: int
    compressions: int
    tokens_per_second: float
    compressing: float
    first: int
    late: Spread
    early: Spread
    slower: float
    first_peak: int | None
    last_peak: int | None
    curve: list[tuple[int, float]] = field(default_factory=list)
    peaks: list[tuple[int, int | None]] = field(default_factory=list)


@dataclass
class Party:
    """A bundle or a peer, and what was measured of it.

    version: of its package; a bundle's is the runtime's. weights: bytes of them that one generated
    token reads, None where the graphs cannot be looked into. pot: bytes of a pot, and pot_read of
    them those that a generated token reads; a peer's cache has `cache` bytes for each token. work:
    floating-point operations of a prompt's token. size: bytes of the weights on disk. build:
    seconds of its own builder, None where it was not run. graphs: a bundle's steps, seconds, by
    name.
    """

    name: str
    kind: str  # "bundle" or "peer"
    version: str
    precision: str
    weights: int | None
    work: int | None
    size: int
    pot: int = 0
    pot_read: int = 0
    cache: int = 0
    build: float | None = None
    note: str = ""
    graphs: dict[str, Spread] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    long: Long | None = None

    def at(self, tokens: int) -> Reading | None:
        """What was measured with so many tokens read."""
        return next((each for each in self.readings if each.tokens == tokens), None)

    def bandwidth_share(self, reading: Reading) -> float | None:
        """Of the machine's copying, that generating takes: bytes of weights and of pot or cache a
        token, by its seconds."""
        if not (self.weights and reading.decode and reading.copy):
            return None
        read = self.weights + self.pot_read + self.cache * reading.tokens
        return read / reading.decode.median / reading.copy.median

    def products_share(self, reading: Reading) -> float | None:
        """Of the machine's products of matrices, that reading a prompt takes."""
        if not (self.work and reading.prompt and reading.products):
            return None
        done = self.work * reading.tokens
        return done / reading.prompt.median / reading.products.median

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        for entry, reading in zip(document["readings"], self.readings, strict=True):
            prompt, decode = reading.prompt, reading.decode
            entry["prefill_tokens_per_second"] = prompt and reading.tokens / prompt.median
            entry["decode_tokens_per_second"] = decode and 1 / decode.median
            entry["bandwidth_share"] = self.bandwidth_share(reading)
            entry["products_share"] = self.products_share(reading)
        return document


@dataclass
class Figures:
    """One run. machine, yardsticks: what `yardsticks` says of them; copy: bytes a second, products:
    floating-point operations a second, over the whole run. left_out: peers, and why."""

    threads: int
    machine: dict[str, Any]
    yardsticks: dict[str, Any]
    copy: Spread
    products: Spread
    parties: list[Party]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "threads": self.threads,
            "machine": self.machine,
            "yardsticks": {
                **self.yardsticks,
                "copy": asdict(self.copy),
                "products": asdict(self.products),
            },
            "left_out": self.left_out,
            "parties": [party.to_json() for party in self.parties],
        }
