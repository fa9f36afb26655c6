"""Rotary positions from tables.

Angles computed in a graph are wrong on fp16 hardware (position x frequency is too coarse), and
context reset bounds every position by pot + chunk. So the model's own rotary module is evaluated
once, in fp32, for all positions that can occur, and the graphs gather rows of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potexport.errors import PotexportError


class TableRotary(nn.Module):
    """Stands in for a transformers rotary module: the same cos and sin, looked up."""

    def __init__(self, rotary: nn.Module, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
        self.cos = nn.Buffer(cos[0].to(dtype).contiguous())  # (positions, D)
        self.sin = nn.Buffer(sin[0].to(dtype).contiguous())

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables for position_ids (1, T) int32: two (1, T, D)."""
        rows = position_ids[0]
        # index_select becomes ONNX Gather; table[rows] would become GatherND, which forbids int32
        # indices.
        return self.cos.index_select(0, rows)[None], self.sin.index_select(0, rows)[None]


def rotary_of(base: nn.Module) -> nn.Module:
    """The one rotary module of a transformers decoder, or PotexportError where there is none or
    several."""
    found = [name for name, child in base.named_children() if "rotary" in name]
    if len(found) != 1:
        kind = type(base).__name__
        raise PotexportError(
            f"{kind} has {len(found)} rotary modules where one was expected; context reset needs "
            "rotary positions, the same "
            "in every layer (learned or per-layer positions are not supported yet)"
        )
    return base.get_submodule(found[0])


def turn_table(rotary: nn.Module, positions: int) -> Tensor:
    """(positions, D) float32, cos and then sin of D/2 angles, that turn a key by 0, 1, 2, …
    positions. One table and not two: rows are gathered once.

    Scaled rotary embeddings multiply cos and sin by a constant; a key carries it already, so it is
    divided out here.
    """
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    scale = cos[0, 0, 0]
    table: Tensor = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1) / scale
    return table


def turn_back(keys: Tensor, by: Tensor) -> Tensor:
    """Rotate keys to earlier positions.

    Args:
        keys: (N, D) rotated, "rotate half" layout: pair i is the elements i and i + D/2.
        by: (N, D), rows of `turn_table` for the number of positions to go back.

    Returns: (N, D). Source: R(new - old) R(old) k = R(new) k; arXiv 2410.01518, section 3.4
    (context-reset RoPE).
    """
    half = keys.shape[-1] // 2
    cos, sin = by[:, :half], by[:, half:]
    first, second = keys[:, :half], keys[:, half:]  # not chunk: it exports as a sequence
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def turn_forward(keys: Tensor, by: Tensor) -> Tensor:
    """Rotate keys to later positions; arguments as of `turn_back`."""
    half = by.shape[-1] // 2
    return turn_back(keys, torch.cat([by[:, :half], -by[:, half:]], dim=-1))


def turn_columns_forward(keys: Tensor, by: Tensor) -> Tensor:
    """The same for keys as a pot has them: keys (R, D, M); by (R, M, D) -> (R, D, M)."""
    half = keys.shape[1] // 2
    by = by.transpose(1, 2)
    cos, sin = by[:, :half], by[:, half:]  # (R, D/2, M)
    first, second = keys[:, :half], keys[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
