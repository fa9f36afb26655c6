"""Attention by one operator of ONNX Runtime, which writes new rows into the pot.

It reads filled slots alone, in the order in which memory has them, and rotates, masks and
normalizes on its way: where it can be used, nothing made of single operators is as fast on a CPU.
But it tells nobody how attention was shared, so a pass that scores slots still computes it in the
open. The traced model has both; `CHOOSE` stands where they meet, and `lower_onnx.cut` takes the
one that a graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FUSED = "com.microsoft::GroupQueryAttention"
CHOOSE = ("potexport", "Choose")  # (in the open, fused) -> either; no runtime has it


@dataclass(frozen=True)
class Lengths:
    """What the fused operator wants to know of a pass. last: (1,) int32, the slot of its last
    token; total: () int32, slots filled after it."""

    last: Tensor
    total: Tensor

    @classmethod
    def of(cls, past_seq_len: Tensor, width: int) -> Lengths:
        return cls(past_seq_len + (width - 1), (past_seq_len + width).reshape(()))


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pot: tuple[Tensor, Tensor],
    lengths: Lengths,
    *,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """To be exported, not to be run.

    Args:
        query: (1, Hq, T, D), rotated; key, value: (1, Hkv, T, D). pot: keys and values,
            (1, Hkv, S, D) each.

    Returns: (1, T, Hq*D), and the pot's keys and values, with the new rows behind the filled slots.
    Source: the specification of the operator, in ONNX Runtime's ContribOperators.md.
    """
    _, query_heads, width, size = query.shape
    kv_heads = key.shape[1]

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(1, width, -1)

    by_head = None if s_aux is None else s_aux.reshape(-1).to(query.dtype)
    unused = [None] * 4  # tables, positions and a bias: rotation and mask are elsewhere
    inputs = [flat(query), flat(key), flat(value), *pot, lengths.last, lengths.total, *unused]
    out, keys, values = torch.onnx.ops.symbolic_multi_out(
        FUSED,
        [*inputs, *([] if by_head is None else [by_head])],
        {
            "num_heads": query_heads,
            "kv_num_heads": kv_heads,
            "scale": float(scaling),
            **({"softcap": float(softcap)} if softcap else {}),
        },
        dtypes=[query.dtype] * 3,
        shapes=[(1, width, query_heads * size), *(part.shape for part in pot)],
        version=1,
    )
    return out, keys, values


def choose(in_the_open: Tensor, fused: Tensor) -> Tensor:
    """Either, as the graph needs it; both of the same shape."""
    chosen: Tensor = torch.onnx.ops.symbolic(
        "::".join(CHOOSE),
        [in_the_open, fused],
        dtype=fused.dtype,
        shape=fused.shape,
        version=1,
    )
    return chosen
