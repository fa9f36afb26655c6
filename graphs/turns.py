"""How each layer turns its keys with their positions: measured, not known.

Families differ in what turns (all of a head, its first part, nothing at all in some layers), in
which elements turn together (those half a head apart, or neighbours) and in how fast (a table for
all layers, or one for each type). One token over an empty pot attends only to itself, so every
layer sees the same hidden states wherever the token stands, and its keys at two positions differ by
their rotation alone: that tells which it is, without any name of a family.

A pot holds keys in one order, in which elements i and i + D/2 turn together; those that do not turn
have an angle of 0. Queries are brought into the same order, so no product changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from potexport.errors import PotexportError
from potexport.graphs.rope import angles, turn_back

Order = tuple[slice, ...]  # the elements of a head, as a pot has them; empty: as they are


def half_apart(pairs: int, size: int) -> Order:
    """Of the first 2 * `pairs` elements i and i + pairs turn together, of `size` in all."""
    if 2 * pairs == size:
        return ()
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    rest, more = _still(pairs, size)
    return first, rest, second, more


def neighbours(pairs: int, size: int) -> Order:
    """Elements 2i and 2i + 1 turn together."""
    even, odd = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    rest, more = _still(pairs, size)
    return (even, odd) if 2 * pairs == size else (even, rest, odd, more)


def _still(pairs: int, size: int) -> tuple[slice, slice]:
    """The elements that do not turn, as two halves."""
    middle = (2 * pairs + size) // 2
    return slice(2 * pairs, middle), slice(middle, size)


def in_order(x: Tensor, order: Order) -> Tensor:
    """(…, D), its elements as a pot has them."""
    return torch.cat([x[..., part] for part in order], dim=-1) if order else x


@dataclass(frozen=True)
class Turn:
    """One layer. table: which of `Turns.tables`, None where keys do not turn."""

    order: Order
    table: int | None


class Turns(nn.Module):
    """All layers. Tables are (positions, D) float32: cos and then sin of D/2 angles, that turn a
    key by 0, 1, 2, … positions. One and not two: rows are gathered once."""

    def __init__(self, tables: Sequence[Tensor], layers: Sequence[Turn]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.count = len(tables)
        for number, table in enumerate(tables):
            self.register_buffer(f"turn_{number}", table)

    def of(self, layer: int) -> Tensor | None:
        """Its table; None where keys do not turn."""
        number = self.layers[layer].table
        return None if number is None else self.get_buffer(f"turn_{number}")

    @property
    def common(self) -> Tensor:
        """The table of all layers, where they are `alike`; of use to coded pots alone."""
        table = self.of(0)
        return torch.empty(0) if table is None else table

    @property
    def orders(self) -> list[Order]:
        return [turn.order for turn in self.layers]

    @property
    def alike(self) -> bool:
        """Whether all layers turn by the same table."""
        return self.count == 1 and all(turn.table == 0 for turn in self.layers)


def measure(
    near: Sequence[Tensor],
    far: Sequence[Tensor],
    tables: Sequence[tuple[Tensor, Tensor]],
    *,
    distance: int,
    within: float,
    model_type: str,
) -> Turns:
    """Find each layer's turn.

    Args:
        near, far: of each layer (Hkv, D), the keys of the same token at position 0 and `distance`
            positions later, as the model orders their elements.
        tables: cos and sin (positions, R) of the model's rotary modules.
        within: the largest relative error of a match.

    Raises PotexportError for keys that turn in no known way.
    """
    size = near[0].shape[-1]
    if size % 2:
        raise PotexportError(f"{model_type} has heads of {size} elements, which cannot turn in two")
    candidates = [Turn((), None)]
    found: list[Tensor] = []
    for cos, sin in tables:
        own = angles(cos, sin)
        pairs = own.shape[1] // 2
        if 2 * pairs > size:
            continue
        for order in (half_apart(pairs, size), neighbours(pairs, size)):
            candidates.append(Turn(order, len(found)))
        found.append(_widened(own, size))
    turns = []
    for layer, (old, new) in enumerate(zip(near, far, strict=True)):
        errors = [_error(old, new, each, found, distance) for each in candidates]
        least = min(range(len(errors)), key=errors.__getitem__)
        if not errors[least] <= within:
            _refuse(model_type, layer, errors[least], len(tables), distance)
        turns.append(candidates[least])
    used = sorted({turn.table for turn in turns if turn.table is not None})
    if not used:
        _refuse(model_type, 0, 0.0, 0, distance)
    return Turns(
        [found[number] for number in used],
        [Turn(t.order, None if t.table is None else used.index(t.table)) for t in turns],
    )


def _widened(own: Tensor, size: int) -> Tensor:
    """A table of n pairs (positions, 2n) for heads of `size`: what does not turn has angle 0."""
    pairs = own.shape[1] // 2
    still = torch.zeros(own.shape[0], size // 2 - pairs, dtype=own.dtype)
    return torch.cat([own[:, :pairs], still + 1, own[:, pairs:], still], dim=-1).contiguous()


def _error(near: Tensor, far: Tensor, turn: Turn, tables: list[Tensor], distance: int) -> float:
    """How far `far` is from `near` once it is turned back, relative to it."""
    wanted = in_order(near, turn.order)
    turned = in_order(far, turn.order)
    if turn.table is not None:
        turned = turn_back(turned, tables[turn.table][distance].expand(turned.shape[0], -1))
    return float((turned - wanted).norm() / wanted.norm())


def _refuse(model_type: str, layer: int, error: float, tables: int, distance: int) -> NoReturn:
    if not tables:
        raise PotexportError(
            f"{model_type} has no rotary positions: what it learned for each position, or a bias "
            "by distance, is in all that its layers hold, so that no kept token could be moved and "
            "positions would run out; choose a decoder with rotary positions"
        )
    raise PotexportError(
        f"layer {layer} of {model_type} does not rotate its keys in any known way (off by "
        f"{error:.1%} over {distance} positions); choose a decoder whose rotary positions turn "
        "whole heads, their first part, or no key of a layer"
    )
