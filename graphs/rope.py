"""Rotary positions from tables.

Angles computed in a graph are wrong on fp16 hardware (position x frequency is too coarse), and
context reset bounds every position. So the model's own rotary modules are evaluated once, in fp32,
for all positions that can occur, and the graphs gather rows of the result.

Models differ in which elements of a key turn together; in a pot those are always i and i + D/2
(`turns` finds out and reorders).
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from potexport.errors import PotexportError


class TableRotary(nn.Module):
    """Stands in for a transformers rotary module: the same cos and sin, looked up.

    Some have frequencies for each type of layer, and are called with its name.
    """

    def __init__(
        self, rotary: nn.Module, positions: int, dtype: torch.dtype, kinds: list[str]
    ) -> None:
        """kinds: the types of layers, where the module tells them apart; else empty."""
        super().__init__()
        self.config = getattr(rotary, "config", None)  # which some families ask it for
        self.kinds = kinds
        self.plain: list[tuple[Tensor, Tensor]] = []  # cos and sin (positions, R) float32
        given = torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None]
        for name in kinds or [""]:
            cos, sin = rotary(*given, *([name] if kinds else []))
            if cos.dim() != 3 or cos.shape != sin.shape:
                raise PotexportError(
                    f"{type(rotary).__name__} gives cos and sin of shape {list(cos.shape)} for one "
                    "row of positions; positions of more than one dimension are not supported"
                )
            self.plain.append((cos[0], sin[0]))
            self.register_buffer(_prefixed(name, "cos"), cos[0].to(dtype).contiguous())
            self.register_buffer(_prefixed(name, "sin"), sin[0].to(dtype).contiguous())

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the tables for position_ids (1, T) int32: two (1, T, R)."""
        kind = layer_type if self.kinds and layer_type else ""
        rows = position_ids[0]
        # index_select becomes ONNX Gather; table[rows] would become GatherND, which forbids int32
        # indices.
        cos, sin = (getattr(self, _prefixed(kind, name)) for name in ("cos", "sin"))
        return cos.index_select(0, rows)[None], sin.index_select(0, rows)[None]


def _prefixed(kind: str, name: str) -> str:
    return f"{kind}_{name}" if kind else name


def rotaries_of(model: nn.Module) -> dict[str, nn.Module]:
    """The rotary modules of a transformers decoder, by name."""
    return {
        name: child for name, child in model.named_modules() if "Rotary" in type(child).__name__
    }


def by_tables(model: nn.Module, positions: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Put a `TableRotary` in the place of each rotary module; cos and sin (positions, R) float32 of
    all of them, each once."""
    found: list[tuple[Tensor, Tensor]] = []
    for name, rotary in rotaries_of(model).items():
        if isinstance(rotary, TableRotary):
            raise TypeError("this model was wrapped before; load it anew")
        parent, _, own = name.rpartition(".")
        table = TableRotary(rotary, positions, dtype, _kinds(rotary))
        setattr(model.get_submodule(parent), own, table)
        for cos, sin in table.plain:
            if not any(_equal(cos, c) and _equal(sin, s) for c, s in found):
                found.append((cos, sin))
    return found


def _kinds(rotary: nn.Module) -> list[str]:
    """The types of layers that a rotary module tells apart."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return []
    kinds: list[str] = sorted(set(rotary.config.layer_types))  # type: ignore[union-attr,arg-type]
    return kinds


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def angles(cos: Tensor, sin: Tensor) -> Tensor:
    """(positions, 2n), cos and then sin of the angle of each of n pairs, from a module's own cos
    and sin (positions, R).

    These hold an angle twice, one half behind the other or side by side, or once (n = R). Scaled
    rotary embeddings multiply them by a constant; a key carries it already, so it is divided out.
    """
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:]):
        cos, sin = cos[:, :half], sin[:, :half]
    elif torch.equal(cos[:, 0::2], cos[:, 1::2]) and torch.equal(sin[:, 0::2], sin[:, 1::2]):
        cos, sin = cos[:, 0::2], sin[:, 0::2]
    return torch.cat([cos, sin], dim=-1) / cos[0, 0]


def turn_back(keys: Tensor, by: Tensor) -> Tensor:
    """Rotate keys to earlier positions.

    Args:
        keys: (N, D) rotated; elements i and i + D/2 turn together.
        by: (N, D), rows of a table of `Turns` for the number of positions to go back.

    Returns: (N, D). Source: R(new - old) R(old) k = R(new) k; arXiv 2410.01518, section 3.4
    (context-reset RoPE).
    """
    half = keys.shape[-1] // 2
    cos, sin = by[:, :half], by[:, half:]
    first, second = keys[:, :half], keys[:, half:]  # not chunk: it exports as a sequence
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def turn_forward(keys: Tensor, by: Tensor) -> Tensor:
    """Rotate keys to later positions; arguments as of `turn_back`."""
    return turn_back(keys, reversed_turn(by))


def reversed_turn(by: Tensor) -> Tensor:
    """(…, D), rows of a table, for the other way round."""
    half = by.shape[-1] // 2
    return torch.cat([by[..., :half], -by[..., half:]], dim=-1)


def turn_columns_forward(keys: Tensor, by: Tensor) -> Tensor:
    """The same for keys as a pot has them: keys (R, D, M); by (R, M, D), or (1, 1, D) to turn all
    alike -> (R, D, M)."""
    half = keys.shape[1] // 2
    by = by.transpose(1, 2)
    cos, sin = by[:, :half], by[:, half:]  # (R, D/2, M)
    first, second = keys[:, :half], keys[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
