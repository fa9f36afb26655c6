"""Falcon: its attention goes past transformers' interface, and keys are handed out in copies.

Falcon 1 (7B, 40B, 180B, and RefinedWeb): arXiv 2311.16867. Falcon 3 is a Llama and needs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from potexport.errors import PotexportError
from potexport.graphs import attention


def adapt(model: PreTrainedModel) -> None:
    """Let each layer's attention read the pot."""
    if model.config.alibi:
        raise PotexportError(
            "this Falcon has no rotary positions but a bias by distance (alibi), which the pot's "
            "attention does not compute; choose one with rotary positions"
        )
    for module in model.modules():
        if isinstance(module, FalconAttention):
            module.forward = partial(_attend, module)  # type: ignore[method-assign]


def kv_heads(config: Any) -> int:
    if config.new_decoder_architecture or not config.multi_query:
        return int(config.num_kv_heads)
    return 1


def _attend(
    module: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """FalconAttention.forward, without a cache: (1, T, E) -> (1, T, E)."""
    query, key, value = _split(module, module.query_key_value(hidden_states))
    turn: Any = apply_rotary_pos_emb
    query, key = turn(query, key, *position_embeddings)
    out, _weights = attention.pot_attention(
        module, query, key, value, None, scaling=module.inv_norm_factor
    )
    return module.dense(out.reshape(1, hidden_states.shape[1], -1)), None


def _split(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, T, …) -> queries (1, Hq, T, D), keys and values (1, Hkv, T, D): each once, where
    transformers copies them for every query head."""
    width, heads, size = fused.shape[1], module.num_heads, module.head_dim
    if module.new_decoder_architecture:
        rows = fused.view(1, width, module.num_kv_heads, -1, size)  # a group, its key, its value
        parts = rows[:, :, :, :-2].flatten(2, 3), rows[:, :, :, -2], rows[:, :, :, -1]
    elif module.multi_query:
        rows = fused.view(1, width, heads + 2, size)
        parts = rows[:, :, :-2], rows[:, :, -2:-1], rows[:, :, -1:]
    else:
        rows = fused.view(1, width, heads, 3, size)
        parts = rows[:, :, :, 0], rows[:, :, :, 1], rows[:, :, :, 2]
    query, key, value = (part.transpose(1, 2) for part in parts)
    return query, key, value
