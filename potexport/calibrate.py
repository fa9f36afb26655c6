"""How large the numbers around each matrix product get, seen in the real loop on real text.

Quantization fixes one scale for each tensor, for good; what lies beyond it is clipped. So the
numbers are watched where they will occur: in prefill, decode and observe, over an empty pot, a full
one and one that was compressed. PyTorch runs the loop (`reference`), for there the products can be
watched without a graph that has them as outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potexport.bundle import PolicyFacts
from potexport.errors import PotexportError
from potexport.graphs.model import Outputs, PotModel
from potexport.graphs.policies import Policy
from potexport.reference import TorchBackend
from potexport.runtime.backend import Array
from potexport.spec import Layout

COMPRESSIONS = 2
STEPS = 4  # tokens decoded after each
MOST_STARTS = 16


@dataclass
class Seen:
    """A tensor, channel by channel: largest magnitude (C,), sum of squares (C,), rows."""

    largest: Tensor
    squares: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """x: (..., C)."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.squares += (rows * rows).sum(0)
        self.rows += rows.shape[0]

    @property
    def range(self) -> float:
        return float(self.largest.max())

    @property
    def typical(self) -> float:
        """The root mean square of the median channel."""
        return float((self.squares / max(self.rows, 1)).sqrt().median())


@dataclass(frozen=True)
class Product:
    """What goes into x @ weight and comes out of it, any bias not yet added."""

    x: Seen
    y: Seen


@dataclass
class Ranges:
    """products: name of a weight in the graphs -> what was seen.

    keys: for each layer the largest norm of a rotated pair. values: the largest magnitude.
    """

    products: dict[str, Product] = field(default_factory=dict)
    keys: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def pair_norm(key: Array) -> float:
    """The largest norm of a pair that rotates together, of (1, Hkv, D, T).

    Pair i is the elements i and i + D/2. No rotation changes its norm, and no coordinate of it ever
    gets larger; the coordinates themselves may grow by the square root of 2.
    """
    half = key.shape[2] // 2
    return float(np.hypot(key[:, :, :half], key[:, :, half:]).max())


class _Watching(TorchBackend):
    """The eager loop, with the rows that leave for the pot looked at."""

    into: Ranges

    def watch(self, into: Ranges) -> None:
        self.into = into
        into.keys = [0.0] * self.layout.facts.layers
        into.values = [0.0] * self.layout.facts.layers

    def run_pass(
        self,
        ids: Array,
        width: int,
        *,
        weigh: bool = False,
        back: int = 0,
        want_queries: bool = False,
    ) -> Outputs:
        out = super().run_pass(ids, width, weigh=weigh, back=back, want_queries=want_queries)
        for layer, (key, value) in enumerate(zip(out.keys, out.values, strict=True)):
            self.into.keys[layer] = max(self.into.keys[layer], pair_norm(key.numpy()))
            self.into.values[layer] = max(self.into.values[layer], float(value.abs().max()))
        return out


def read_text(path: Path) -> str:
    """A calibration text, or a PotexportError with the reason."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PotexportError(f"the calibration text {path} cannot be read: {error}") from error


def tokens(text: str, tokenizer: Any, layout: Layout) -> tuple[Array, list[int]]:
    """What `calibrate` reads: (n,) int32 of a text, and tokens that a prompt may begin with."""
    ids = tokenizer.encode(text[: 20 * needed(layout)], add_special_tokens=False)
    return np.array(ids, np.int32), sorted(set(tokenizer.all_special_ids))[:MOST_STARTS]


def needed(layout: Layout) -> int:
    """How many tokens of text `calibrate` reads."""
    pot = layout.pot
    return pot.slots + COMPRESSIONS * (pot.slots - pot.keep) + STEPS * (COMPRESSIONS + 1)


def calibrate(
    core: PotModel,
    policy: tuple[PolicyFacts, Policy],
    layout: Layout,
    ids: Array,
    *,
    catalyst: Sequence[int],
    starts: Sequence[int] = (),
) -> Ranges:
    """Run the loop over `ids` and watch.

    Args:
        layout: of the float graphs.
        ids: (n,) int32 of real text, at least `needed(layout)`.
        starts: tokens that a prompt may begin with. What stands first draws attention from
            everything behind it, and a few channels get a thousand times larger there than anywhere
            else; so each of these is read once, over an empty pot, with text behind it.
    """
    if ids.size < needed(layout):
        raise PotexportError(
            f"the calibration text has {ids.size} tokens; this pot needs {needed(layout)}: give a "
            "longer --calibration or a smaller --pot"
        )
    ranges = Ranges()
    with torch.no_grad(), _watched(core.model, ranges):
        backend = _Watching(core, [policy], layout)
        backend.watch(ranges)
        _read(backend, layout, ids, catalyst)
        width = layout.pot.chunk
        for start in starts:
            backend.pot.fill = 0
            head = np.concatenate([np.array([start], np.int32), ids[: width - 1]])
            backend.prefill(head, head, 0.0)
    return ranges


def _read(backend: TorchBackend, layout: Layout, ids: Array, catalyst: Sequence[int]) -> None:
    """Fill the pot, compress it, fill it again; decode a little in each state."""
    pot, done = layout.pot, 0
    asked = np.array(catalyst[-pot.catalyst_width :], np.int32)
    for turn in range(COMPRESSIONS + 1):
        for _ in range(STEPS):
            backend.decode(int(ids[done]), 0.0)
            done += 1
        while backend.pot.fill < pot.slots:
            count = min(pot.chunk, pot.slots - backend.pot.fill)
            chunk, following = ids[done : done + count], ids[done + 1 : done + 1 + count]
            backend.prefill(chunk, following, 0.0)
            done += count
        if "mass" in layout.needs and asked.size:
            backend.observe(asked)
        if "window" in layout.needs:
            window = backend.policy.window
            backend.observe(ids[done - window : done], back=window, into="window")
        if turn < COMPRESSIONS:
            backend.compress(pot.keep)


@contextmanager
def _watched(model: nn.Module, ranges: Ranges) -> Iterator[None]:
    """Note what goes through every linear layer, by the names that its weight may have in the
    graphs."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            columns, rows = module.weight.shape
            seen = Product(*(Seen(torch.zeros(n), torch.zeros(n)) for n in (rows, columns)))
            ranges.products |= {name: seen for name in names[id(module.weight)]}
            hooks.append(module.register_forward_hook(_noting(seen)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _noting(seen: Product) -> Callable[[Any, Any, Any], None]:
    def note(module: Any, inputs: Any, output: Any) -> None:
        seen.x.add(inputs[0])
        seen.y.add(output if module.bias is None else output - module.bias)

    return note
