"""Attention over a pot and over the tokens of this pass, under one softmax.

Hugging Face's decoder layers call this function through transformers' attention interface, so that
the model's own code is traced and only the attention is ours. The pot is read and never copied:
query x pot keys and query x new keys are two products side by side, and what leaves is the new
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from potexport.errors import PotexportError
from potexport.geometry import PotGeometry
from potexport.graphs.codes import Codes
from potexport.graphs.in_place import Lengths, choose, fused_attention
from potexport.graphs.turns import Order, in_order

NAME = "potexport"

# Arguments by which transformers' layers ask for attention that this function does not compute.
UNSUPPORTED = ("alibi", "position_bias")


@dataclass
class Pass:
    """One pass of the model over a pot: what its attention reads, and what it leaves behind.

    keys: L tensors (Hkv, D, M), rotated at their slots' positions; values: L tensors (Hkv, M, D).
    masks: L tensors (g*T, M + T), added to the scores: 0 where visible, very negative where not; g
        query heads share a key/value head.
    orders: of each layer, the elements of queries and keys as the pot has them.
    codes: of a coded pot, of which `keys` and `values` are only F columns; M are both together.
    row_weights: (Hkv, 1, g*T) float32, of each row in the mass, or None where none is wanted.
    in_place: of a pot that is written in place its keys and values, L x (1, Hkv, S, D) each, and
        how full it is; `keys` and `values` are views of it. What leaves is the pot itself then.
    """

    keys: list[Tensor]
    values: list[Tensor]
    masks: list[Tensor]
    orders: Sequence[Order]
    geometry: PotGeometry
    codes: Codes | None = None
    row_weights: Tensor | None = None
    in_place: tuple[list[tuple[Tensor, Tensor]], Lengths] | None = None
    new_keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> (1, Hkv, D, T)
    new_values: dict[int, Tensor] = field(default_factory=dict)  # layer -> (1, Hkv, T, D)
    mass: dict[int, Tensor] = field(default_factory=dict)  # layer -> (Hkv, M) float32
    new_mass: dict[int, Tensor] = field(default_factory=dict)  # layer -> (Hkv, T) float32
    # layer -> (1, Hq, T, D), rotated, if wanted; as if the model scaled scores by 1/sqrt(D).
    queries: dict[int, Tensor] | None = None


# Not an argument, for some families' layers hand on only those that they know.
_PASS: ContextVar[Pass] = ContextVar("pass")


@contextmanager
def over(step: Pass) -> Iterator[None]:
    """Let the attention of a model that is called within read this pot."""
    token = _PASS.set(step)
    try:
        yield
    finally:
        _PASS.reset(token)


def mask(
    past_seq_len: Tensor,
    *,
    slots: int,
    width: int,
    group: int,
    dtype: torch.dtype,
    order: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """(g*T, M + T): slots below `past_seq_len` (1,) are visible to all, tokens of the pass to those
    after them. order: (M + T,) int32, the slot in each column, if not its index; that of a new
    token is beyond any. window: how many tokens a query sees, itself included, where slots hold the
    last ones in their order; 0 for all."""
    # A score added to it cannot overflow; infinities are wrong on some NPUs.
    hidden = torch.finfo(dtype).min / 4
    # No concatenation: the HTP lost a constant that was joined to a computed mask, and then only
    # if another graph had run before (seen for one token over 48 slots).
    column = torch.arange(slots + width, dtype=torch.int32)
    new = torch.where(column < slots, slots + width, column - slots)  # no slot is a new token
    row = torch.arange(width, dtype=torch.int32).repeat(group)
    # A slot's column is its index, and no new token's column is below past_seq_len.
    slot = column if order is None else order
    visible = torch.logical_or(slot < past_seq_len, new[None, :] <= row[:, None])
    if window:
        token = torch.where(
            column < slots, column - past_seq_len, new
        )  # of the pass; before it < 0
        visible = torch.logical_and(visible, row[:, None] - token[None, :] < window)
    return torch.where(visible, 0.0, hidden).to(dtype)


def row_weights(query_weights: Tensor, *, kv_heads: int, group: int) -> Tensor:
    """(T,) float32, of the catalyst's tokens -> (Hkv, 1, g*T): mass is the mean over a group's
    heads."""
    return (query_weights / group).repeat(group).expand(kv_heads, 1, -1)


def pot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it, over the pot of the present pass; the
    new rows, and the mass if wanted, are left in that.

    Args:
        query: (1, Hq, T, D), rotated. key, value: (1, Hkv, T, D), the key rotated.
        sliding_window: how many tokens a query sees; refused if the pot was not made for it.
        softcap: the bound that scores approach (arXiv 2408.00118, section 2).
        s_aux: (Hq,), a score of each head that takes its share of attention and gives nothing
            (arXiv 2508.10925, section 2.2).

    Returns: (1, T, Hq, D) and None for the attention weights.
    Source: arXiv 2410.01518, section 3 (mass, "catalyst prompt"): u_t = sum over catalyst queries
    of Attn(x_i -> x_t).
    Differs: averaged over the query heads of a group, which the paper leaves open.
    """
    pot = _PASS.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    refuse(module, attention_mask, extra)
    check_window(module, sliding_window, layer, pot.geometry)
    check_heads(module, key, value, pot.keys[layer])
    query, key = (in_order(each, pot.orders[layer]) for each in (query, key))
    new_key = key.reshape(key.shape[1:]).transpose(1, 2)  # (Hkv, D, T)
    out = _in_the_open(layer, query * scaling, new_key, value, softcap, s_aux)
    if pot.queries is not None:
        pot.queries[layer] = query * (scaling * query.shape[3] ** 0.5)
    # Contiguous, as transformers' own are: some families view it in another shape.
    out = out.reshape(query.shape).transpose(1, 2).contiguous()
    if pot.in_place is None:
        pot.new_keys[layer], pot.new_values[layer] = new_key[None], value
        return out, None
    held_rows, lengths = pot.in_place
    fused, pot.new_keys[layer], pot.new_values[layer] = fused_attention(
        query, key, value, held_rows[layer], lengths, scaling=scaling, softcap=softcap, s_aux=s_aux
    )
    return choose(out.reshape(fused.shape), fused).reshape(out.shape), None


def _in_the_open(
    layer: int,
    query: Tensor,
    new_key: Tensor,
    value: Tensor,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """(Hkv, g*T, D), and the mass where it is wanted. query: scaled; new_key: (Hkv, D, T)."""
    pot = _PASS.get()
    _, query_heads, width, size = query.shape
    past_key, past_value = pot.keys[layer], pot.values[layer]
    if past_key.dtype != query.dtype:  # a pot in fewer bytes
        past_key, past_value = past_key.to(query.dtype), past_value.to(query.dtype)
    kv_heads, _, floats = past_key.shape
    new_value = value.reshape(kv_heads, width, size)
    # The heads of a group are more rows of one product.
    rows = query.reshape(kv_heads, query_heads // kv_heads * width, size)
    codes = pot.codes
    coded = [codes.scores(layer, rows)] if codes else []
    scores = torch.cat([rows @ past_key, *coded, rows @ new_key], dim=-1)  # (Hkv, g*T, M+T)
    slots = scores.shape[-1] - width
    weights = _shares(scores, pot.masks[layer], softcap, s_aux)
    if pot.row_weights is not None:
        held = pot.geometry.slots_of(layer) if pot.in_place else slots
        pot.mass[layer] = (pot.row_weights @ weights[..., :held])[:, 0]
        pot.new_mass[layer] = (pot.row_weights @ weights[..., slots:])[:, 0]
    weights = weights.to(query.dtype)
    out = weights[..., :floats] @ past_value + weights[..., slots:] @ new_value  # (Hkv, g*T, D)
    if codes:
        out = out + codes.values(layer, weights[..., floats:slots])
    return out


def _shares(scores: Tensor, mask: Tensor, softcap: float | None, s_aux: Tensor | None) -> Tensor:
    """(Hkv, g*T, M+T) float32: of each row's attention what goes to each column."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if s_aux is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    kv_heads, rows, columns = scores.shape
    each = s_aux.reshape(kv_heads, -1, 1).to(scores.dtype)  # (Hkv, g, 1)
    nothing = each.expand(-1, -1, rows // each.shape[1]).reshape(kv_heads, rows, 1)
    scores = torch.cat([scores, nothing], dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :columns]


def refuse(module: nn.Module, attention_mask: Tensor | None, extra: dict[str, Any]) -> None:
    """Raise PotexportError for attention that would come out wrong without a word."""
    kind = type(module).__name__
    asked = [name for name in UNSUPPORTED if extra.get(name) is not None]
    if asked:
        raise PotexportError(
            f"{kind} asks for {', '.join(asked)}, which the pot's attention does not compute yet"
        )
    if attention_mask is not None:  # transformers was told to make none: it is the family's own
        raise PotexportError(
            f"{kind} has a mask of its own, which the pot's attention does not apply; choose a "
            "decoder with plain causal attention or sliding windows"
        )


def check_window(
    module: nn.Module, sliding_window: int | None, layer: int, pot: PotGeometry
) -> None:
    """Raise PotexportError where the model's code and its config differ about a layer's window."""
    window = sliding_window if sliding_window and sliding_window < pot.positions else 0
    if window != pot.window_of(layer):
        kind, config = type(module).__name__, pot.window_of(layer) or "all tokens"
        raise PotexportError(
            f"{kind} of layer {layer} tells attention to look back {window or 'at all tokens'}, "
            f"and the model's config says {config}; mend sliding_window, layer_types or "
            "use_sliding_window in config.json, or choose another model"
        )


def check_heads(module: nn.Module, key: Tensor, value: Tensor, past_key: Tensor) -> None:
    """Raise PotexportError for heads that are not the pot's. past_key: (Hkv, D, M)."""
    if key.shape != value.shape:
        raise PotexportError(
            f"{type(module).__name__} makes keys of {key.shape[1]} heads of {key.shape[3]} and "
            f"values of {value.shape[1]} of {value.shape[3]}; a pot takes heads of one size (not "
            "latent attention)"
        )
    if (key.shape[1], key.shape[3]) != tuple(past_key.shape[:2]):
        raise PotexportError(
            f"{type(module).__name__} makes {key.shape[1]} key/value heads of {key.shape[3]}, and "
            f"the model's config says {past_key.shape[0]} of {past_key.shape[1]}; mend "
            "num_key_value_heads or head_dim in config.json, or choose another model"
        )


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers builds no mask for us: `mask` above is the one that counts."""
    return None


def register() -> None:
    """Make `attn_implementation="potexport"` known to transformers; calling it again changes
    nothing."""
    AttentionInterface.register(NAME, pot_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
