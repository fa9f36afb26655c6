"""The coded part of a pot, in the graphs: attention over codes, and codes in a compression.

Keys are coded as they were before rotation, so that no reset ever turns and rounds a code
(docs/quantized-pots.md has the figures); each pass turns them to where they stand. Values need one
cast: what belongs to a slot goes into its weight. Two codes of 4 bits share a byte, low + 16 *
high, elements i and i + D/2 of a row, which for a key is a pair that turns together.

Letters beside those of `graphs`: F columns in full precision, B of codes, D' bytes of a row.
Columns stand in the order F, B; slots in the order sinks, codes, newest (`potexport.coding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from potexport.coding import Coding
from potexport.geometry import PotGeometry
from potexport.graphs.rope import turn_columns_forward

PLACE = 16  # what the high of two codes in a byte counts
TINY = 1e-8  # smallest scale, of a row of zeros
BEYOND = 1 << 24  # behind any slot
KINDS = ("codes.{}.key", "codes.{}.value", "scales.{}.key", "scales.{}.value")
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Codes:
    """length: (1,) or (L,) int32, how many slots are codes. channels: (L, 2, Hkv, D), the centre
    and the spread of the keys'. layers: of each the codes of keys (1, Hkv, D', B) and of values
    (1, Hkv, B, D') int8, and the scales of keys and of values (Hkv, B). positions: L x (Hkv, M)
    int32, where a slot's key stands. turn: cos and sin (positions, D/2). in_turns: look up a
    layer's only when its turn comes, for runtimes that would else begin with those of all, which
    are half as large as the pot in floats."""

    length: Tensor
    channels: Tensor
    layers: Sequence[Four]
    positions: Sequence[Tensor]
    turn: Tensor
    sink: int
    in_turns: bool = False

    @classmethod
    def of(
        cls,
        given: Mapping[str, Tensor],
        sink: int,
        turn: Tensor,
        *,
        in_turns: bool = False,
    ) -> Codes | None:
        """From a graph's inputs by name; None where the pot is not coded."""
        if "past_coded" not in given:
            return None
        names = takewhile(
            lambda names: names[0] in given,
            (["past_" + kind.format(layer) for kind in KINDS] for layer in count()),
        )
        layers = [tuple(given[name] for name in each) for each in names]
        positions = [given[f"positions.{layer}"] for layer in range(len(layers))]
        return cls(
            given["past_coded"],
            given["key_channels"],
            layers,  # type: ignore[arg-type]
            positions,
            turn,
            sink,
            in_turns,
        )

    @classmethod
    def in_order(
        cls,
        tensors: Sequence[Tensor],
        positions: Sequence[Tensor],
        sink: int,
        turn: Tensor,
    ) -> Codes | None:
        """From the tensors of `Layout.codes`; None if there are none."""
        if not tensors:
            return None
        length, channels, *rest = tensors
        layers = zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
        return cls(length, channels, list(layers), positions, turn, sink)

    @property
    def bits(self) -> int:
        return 8 * self.layers[0][0].shape[2] // self.channels.shape[3]

    def length_of(self, layer: int) -> Tensor:
        return self.length if self.length.shape[0] == 1 else self.length[layer : layer + 1]

    def scores(self, layer: int, rows: Tensor) -> Tensor:
        """rows (Hkv, g*T, D), scaled queries -> (Hkv, g*T, B)."""
        return rows @ self.keys(layer, rows.dtype, after=rows if self.in_turns else None)

    def keys(self, layer: int, dtype: torch.dtype, *, after: Tensor | None = None) -> Tensor:
        """Those in codes, turned to where they stand: (Hkv, D, B). after: what must be known
        first."""
        packed, _, scales, _ = self.layers[layer]
        codes = packed.reshape(packed.shape[1:]).to(dtype)
        centre, spread = self.channels[layer, 0], self.channels[layer, 1]  # (Hkv, D)
        made = _unpack(codes, self.bits, dim=1) * scales[:, None] * spread[:, :, None]
        heads, body = scales.shape
        stood = self.positions[layer][:, self.sink : self.sink + body].reshape(-1)
        if after is not None:  # adds 0
            stood = stood + (after.reshape(-1)[:1] > torch.finfo(dtype).max).to(torch.int32)
        by = self.turn.index_select(0, stood).reshape(heads, body, -1).to(dtype)
        return turn_columns_forward(made + centre[:, :, None], by)

    def values(self, layer: int, weights: Tensor) -> Tensor:
        """weights (Hkv, g*T, B) -> (Hkv, g*T, D)."""
        _, packed, _, scales = self.layers[layer]
        codes = packed.reshape(packed.shape[1:]).to(weights.dtype)  # (Hkv, B, D')
        scaled = weights * scales[:, None]
        if self.bits == 8:
            return scaled @ codes
        whole, high = scaled @ codes, scaled @ _high(codes)
        return torch.cat([whole - PLACE * high, high], dim=-1)

    def order(self, layer: int, slots: int, width: int) -> Tensor:
        """(M + T,) int32: the slot in each column; beyond any where there is none."""
        column = torch.arange(slots + width, dtype=torch.int32)
        body = self.layers[layer][0].shape[3]
        floats, length = slots - body, self.length_of(layer)
        newest = torch.where(column < self.sink, column, column + length)
        place = column - floats
        coded = torch.where(
            torch.logical_and(place < length, column < floats + body), place + self.sink, BEYOND
        )
        return torch.where(column < floats, newest, coded)

    def columns(self, layer: int, floats: int) -> Tensor:
        """(M,) int32: the column of each slot."""
        slot = torch.arange(floats + self.layers[layer][0].shape[3], dtype=torch.int32)
        length = self.length_of(layer)
        behind = torch.where(slot < self.sink + length, slot + (floats - self.sink), slot - length)
        return torch.where(slot < self.sink, slot, behind)


@dataclass(frozen=True)
class Stored:
    """A whole coded pot, for a compression. keys, values: L x (1, Hkv, D, F), (1, Hkv, F, D).
    keep_coded: like Codes.length, of the kept slots."""

    codes: Codes
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    keep_coded: Tensor

    def in_order(self) -> tuple[InOrder, InOrder]:
        """Keys and values of each layer in floats and in the order of slots."""
        return InOrder(self, self._layer_keys), InOrder(self, self._layer_values)

    def _layer_keys(self, layer: int) -> Tensor:
        floats = self.keys[layer][0]
        made = self.codes.keys(layer, floats.dtype)  # (Hkv, D, B)
        columns = self.codes.columns(layer, floats.shape[2])
        return torch.cat([floats, made], dim=2).index_select(2, columns)[None]

    def _layer_values(self, layer: int) -> Tensor:
        _, packed, _, scales = self.codes.layers[layer]
        floats = self.values[layer][0]
        made = _unpack(packed[0].to(floats.dtype), self.codes.bits, dim=2) * scales[:, :, None]
        columns = self.codes.columns(layer, floats.shape[1])
        return torch.cat([floats, made], dim=1).index_select(1, columns)[None]

    def _channels(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.codes.channels[layer, 0], self.codes.channels[layer, 1]  # (Hkv, D)

    def rows(self, layer: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of kept slots (Hkv, K): which are in full precision (Hkv*K, 1); their keys, and those of
        the others before rotation, (Hkv*K, D) each; all values (Hkv, K, D)."""
        (heads, width), bits = kept.shape, self.codes.bits
        key_codes, value_codes, key_scales, value_scales = self.codes.layers[layer]
        keys, values = self.keys[layer][0].transpose(1, 2), self.values[layer][0]
        floats, size, body = keys.shape[1], keys.shape[2], key_codes.shape[3]
        columns = self.codes.columns(layer, floats).index_select(0, kept.reshape(-1))
        columns = columns.reshape(heads, width)
        exact = flat(columns.clamp(max=floats - 1), floats)
        coded = flat((columns - floats).clamp(min=0), body)
        whole = (columns < floats).reshape(-1, 1)

        def among(packed: Tensor, scales: Tensor) -> Tensor:
            chosen = packed.reshape(heads * body, -1).index_select(0, coded).to(keys.dtype)
            return _unpack(chosen, bits, dim=1) * scales.reshape(-1).index_select(0, coded)[:, None]

        centre, spread = (each[:, None] for each in self._channels(layer))
        made = among(key_codes[0].transpose(1, 2), key_scales).reshape(heads, width, size)
        made = (made * spread + centre).reshape(heads * width, size)
        own = keys.reshape(heads * floats, size).index_select(0, exact)
        made_values = among(value_codes[0], value_scales)
        own_values = values.reshape(heads * floats, size).index_select(0, exact)
        chosen = torch.where(whole, own_values, made_values).reshape(heads, width, size)
        return whole, own, made, chosen

    def store(
        self, layer: int, keys: Tensor, plain: Tensor, values: Tensor, pot: PotGeometry
    ) -> tuple[Tensor, Tensor, Four]:
        """Kept keys (Hkv*K, D), also before rotation, and values (Hkv, K, D) as the pot has them:
        those in full precision, and the codes."""
        heads, width, size = values.shape
        keys, plain = (x.reshape(heads, width, size).transpose(1, 2) for x in (keys, plain))
        bits, floats, most = self.codes.bits, self.keys[layer].shape[3], width - 1
        coding = Coding(bits, pot.sink, pot.recent)
        body = max(coding.coded(pot.keep_max_of(layer), pot.slots_of(layer)), 1)
        one = self.keep_coded.shape[0] == 1
        length = self.keep_coded if one else self.keep_coded[layer : layer + 1]
        column = torch.arange(floats, dtype=torch.int32)
        newest = torch.where(column < pot.sink, column, column + length).clamp(max=most)
        rest = torch.arange(pot.sink, pot.sink + body, dtype=torch.int32).clamp(max=most)
        centre, spread = self._channels(layer)
        plain = (plain.index_select(2, rest) - centre[:, :, None]) / spread[:, :, None]
        key_codes, key_scales = _quantize(plain, bits, dim=1)
        value_codes, value_scales = _quantize(values.index_select(1, rest), bits, dim=2)
        return (
            keys.index_select(2, newest)[None],
            values.index_select(1, newest)[None],
            (key_codes[None], value_codes[None], key_scales, value_scales),
        )


class InOrder(Sequence[Tensor]):
    """Tensors of layers, each made when it is asked for: never all of a pot at once."""

    def __init__(self, stored: Stored, make: Callable[[int], Tensor]) -> None:
        self._stored, self._make = stored, make

    def __len__(self) -> int:
        return len(self._stored.keys)

    def __getitem__(self, layer: Any) -> Any:
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        return self._make(layer)


def flat(slots: Tensor, count: int) -> Tensor:
    """(Hkv, K) int32, of `count` in each head -> (Hkv*K,), of all heads' in one long list: a plain
    Gather on axis 0, which every NPU compiler gets right."""
    heads = slots.shape[0]
    return (slots + count * torch.arange(heads, dtype=torch.int32)[:, None]).reshape(-1)


def _quantize(rows: Tensor, bits: int, *, dim: int) -> tuple[Tensor, Tensor]:
    """Packed codes, and a scale for each row, whose elements are along `dim`: `runtime.codes`."""
    most = 2 ** (bits - 1) - 1
    scales = (rows.abs().amax(dim=dim, keepdim=True) / most).clamp(min=TINY)
    codes = torch.round(rows / scales)
    if bits == 4:
        half = rows.shape[dim] // 2
        codes = codes.narrow(dim, 0, half) + PLACE * codes.narrow(dim, half, half)
    return codes.to(torch.int8), scales.squeeze(dim)


def _unpack(codes: Tensor, bits: int, *, dim: int) -> Tensor:
    """Bytes as floats -> codes as floats."""
    if bits == 8:
        return codes
    high = _high(codes)
    return torch.cat([codes - PLACE * high, high], dim=dim)


def _high(codes: Tensor) -> Tensor:
    return torch.floor(codes * (1 / PLACE) + 0.5)
