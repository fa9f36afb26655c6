"""A pot most of whose slots are codes (`potexport.coding` says which)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potexport.bundle import KEY_FILES
from potexport.errors import PotexportError
from potexport.runtime import codes
from potexport.runtime.pot import Array, Pot
from potexport.runtime.rows_pot import RowsPot
from potexport.spec import Layout

# What a layer's codes are: by `Layout.codes`, `{}` for the layer.
KINDS = ("past_codes.{}.key", "past_scales.{}.key", "past_codes.{}.value",
         "past_scales.{}.value")  # fmt: skip


@dataclass(frozen=True)
class KeyFacts:
    """channels: (L, 2, Hkv, D), the centre and the spread of each channel of the keys. turn:
    (2, positions, D/2), cos and sin."""

    channels: Array
    turn: Array


def make_pot(layout: Layout, key_facts: KeyFacts | None = None) -> Pot:
    """An empty pot. key_facts: for a coded one."""
    if layout.coding is None:
        return RowsPot(layout) if layout.in_place else Pot(layout)
    assert key_facts is not None
    return CodedPot(layout, key_facts)


def read_key_facts(folder: str | os.PathLike[str], layout: Layout) -> KeyFacts | None:
    """What the bundle knows of keys; None if its pot is not coded."""
    if layout.coding is None:
        return None
    turn = (2, layout.pot.positions, layout.facts.head_size // 2)
    wanted = (layout.codes()[1].shape, turn)
    return KeyFacts(*(_load(Path(folder) / n, s) for n, s in zip(KEY_FILES, wanted, strict=True)))


def _load(path: Path, shape: tuple[int, ...]) -> Array:
    try:
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PotexportError(f"{path} cannot be read ({error}); build the bundle again") from error
    if (found.dtype.name, found.shape) != ("float32", shape):
        raise PotexportError(
            f"{path} holds {found.dtype.name}{list(found.shape)}, not float32{list(shape)}; build "
            "the bundle again"
        )
    return found


class CodedPot(Pot):
    """keys, values: only the columns in full precision, sinks first and then the newest slots:
    L x (1, Hkv, D, F) and L x (1, Hkv, F, D). held: by name, the arrays of `Layout.codes`.

    Slots are numbered as in any pot: sinks, then those that are codes, then the newest.
    """

    def __init__(self, layout: Layout, key_facts: KeyFacts) -> None:
        super().__init__(layout)
        assert layout.coding is not None
        self._coding = layout.coding
        self.held = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in layout.codes()}
        self.held["key_channels"][...] = key_facts.channels
        self._turn = key_facts.turn
        layers = range(layout.facts.layers)
        self._parts = [[self.held[kind.format(layer)] for kind in KINDS] for layer in layers]

    def coded(self, counts: Array) -> Array:
        pairs = zip(counts.tolist(), self.sizes.tolist(), strict=True)
        return np.array([self._coding.coded(fill, slots) for fill, slots in pairs], np.int32)

    def ready(self) -> None:
        self.held["past_coded"][:] = self.coded(self.fills)

    def keys_of(self, layer: int) -> Array:
        """The filled slots of a layer, dequantized and in order: (Hkv, D, fill)."""
        packed, scales = self._parts[layer][:2]
        sink, body, newest = self._counts(layer, self.fills)
        made = codes.keys_of(
            packed[0, :, :, :body],
            scales[:, :body],
            self.held["key_channels"][layer],
            self._coding.bits,
        )
        floats, first = self.keys[layer][0], self._coding.sink
        cos, sin = self._tables(layer, first, first + body)
        made = codes.turn_back(made, cos, -sin)
        return np.concatenate(
            [floats[..., :sink], made, floats[..., sink : sink + newest]], axis=-1
        )

    def values_of(self, layer: int) -> Array:
        """(Hkv, fill, D)."""
        packed, scales = self._parts[layer][2:]
        sink, body, newest = self._counts(layer, self.fills)
        made = codes.values_of(packed[0, :, :body], scales[:, :body], self._coding.bits)
        floats = self.values[layer][0]
        return np.concatenate([floats[:, :sink], made, floats[:, sink : sink + newest]], axis=1)

    def _counts(self, layer: int, fills: Array) -> tuple[int, int, int]:
        """Slots of a layer: sinks, codes, newest."""
        fill, slots = self._of(fills, layer), self._of(self.sizes, layer)
        sink, body = min(fill, self._coding.sink), self._coding.coded(fill, slots)
        return sink, body, fill - sink - body

    def append_rows(self, layer: int, keys: Array, values: Array, count: int) -> None:
        key, value = self.keys[layer][0], self.values[layer][0]
        sink, body, newest = self._counts(layer, self.fills)
        slots = self._of(self.sizes, layer)
        more = self._coding.coded(self.filled(layer) + count, slots) - body
        new_key, new_value = keys[0, ..., :count], values[0, :, :count]
        end = sink + newest
        if not more:
            key[..., end : end + count], value[:, end : end + count] = new_key, new_value
            return
        # The oldest of the newest, and of the new rows, become codes; sinks are among neither, for
        # nothing is coded before they are there.
        first = self._coding.sink
        new_key = np.concatenate([key[..., :end], new_key], axis=-1)
        new_value = np.concatenate([value[:, :end], new_value], axis=1)
        key[..., :first], value[:, :first] = new_key[..., :first], new_value[:, :first]
        old = slice(first, first + more)
        self._code(layer, body, new_key[..., old], new_value[:, old])
        new_key, new_value = new_key[..., first + more :], new_value[:, first + more :]
        end = first + new_key.shape[-1]
        key[..., first:end], value[:, first:end] = new_key, new_value

    def _code(self, layer: int, first: int, keys: Array, values: Array) -> None:
        """Make the rows keys (Hkv, D, n) and values (Hkv, n, D) the codes from `first` on."""
        bits, last = self._coding.bits, first + keys.shape[-1]
        packed, scales, packed_values, value_scales = self._parts[layer]
        channels, slot = self.held["key_channels"][layer], self._coding.sink + first
        keys = codes.turn_back(keys, *self._tables(layer, slot, slot + keys.shape[-1]))
        packed[0, :, :, first:last], scales[:, first:last] = codes.code_keys(keys, channels, bits)
        made = codes.code_values(values, bits)
        packed_values[0, :, first:last], value_scales[:, first:last] = made

    def _tables(self, layer: int, first: int, last: int) -> tuple[Array, Array]:
        """cos and sin (Hkv, D/2, n) of where the keys of these slots stand."""
        stood = self.positions[layer][:, first:last]
        cos, sin = (table[stood].transpose(0, 2, 1) for table in self._turn)
        return cos, sin

    def replace_rows(
        self,
        layer: int,
        keys: Array,
        values: Array,
        count: int,
        coded: tuple[Array, ...],
    ) -> None:
        self.keys[layer][...], self.values[layer][...] = keys, values
        key_codes, value_codes, key_scales, value_scales = coded
        slots = self._of(self.sizes, layer)
        body = self._coding.coded(count, slots)
        packed, scales, packed_values, own_value_scales = self._parts[layer]
        packed[..., :body], scales[:, :body] = key_codes[..., :body], key_scales[:, :body]
        packed_values[:, :, :body] = value_codes[:, :, :body]
        own_value_scales[:, :body] = value_scales[:, :body]

    def _rows_of(self, layer: int, fills: Array) -> dict[str, Array]:
        sink, body, newest = self._counts(layer, fills)
        packed, scales, packed_values, value_scales = self._parts[layer]
        end = sink + newest
        parts = (packed[..., :body], scales[:, :body], packed_values[:, :, :body],
                 value_scales[:, :body])  # fmt: skip
        return {
            f"past_key_values.{layer}.key": self.keys[layer][..., :end],
            f"past_key_values.{layer}.value": self.values[layer][:, :, :end],
            **{kind.format(layer): part for kind, part in zip(KINDS, parts, strict=True)},
        }

    def _arrays(self) -> list[Array]:
        return [*super()._arrays(), *self.held.values()]
