"""Rows of keys and values as small whole numbers, in numpy.

A row is divided by one number, its scale, so that its largest element becomes the largest code, and
rounded; dividing what comes back gives the same codes again. Keys are first centred and spread
channel by channel (`potexport.channels`), for some of their channels are far larger than others.
The compression graph does the same arithmetic (`graphs.codes`).

Source: arXiv 2402.02750 (KIVI), arXiv 2401.18079 (KVQuant): keys by channel, values by token.
Differs: channels are measured once, at build time, and a key has a scale of its own as well. So a
row is coded without its neighbours and moves without them, and none is clipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TINY = 1e-8  # smallest scale, of a row of zeros
PLACE = 16  # two codes of 4 bits in a byte: low + 16 * high, both from -7 to 7


def largest(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


def quantize(rows: Array, bits: int, *, axis: int) -> tuple[Array, Array]:
    """Codes int8 of the shape of `rows`, and a scale for each row; `axis` is that of a row's
    elements."""
    most = rows.dtype.type(largest(bits))
    scales = np.maximum(np.abs(rows).max(axis=axis, keepdims=True) / most, rows.dtype.type(TINY))
    return np.rint(rows / scales).astype(np.int8), scales.squeeze(axis)


def dequantize(codes: Array, scales: Array, *, axis: int) -> Array:
    made: Array = codes.astype(scales.dtype) * np.expand_dims(scales, axis)
    return made


def pack(codes: Array, bits: int, *, axis: int) -> Array:
    """Codes of 4 bits, two to a byte: element i of a row and element i + D/2."""
    if bits == 8:
        return codes
    low, high = np.split(codes, 2, axis=axis)
    packed: Array = low + np.int8(PLACE) * high
    return packed


def unpack(packed: Array, bits: int, *, axis: int) -> Array:
    if bits == 8:
        return packed
    high = (packed.astype(np.int16) + PLACE // 2) >> 4
    low = packed - PLACE * high
    made: Array = np.concatenate([low, high], axis=axis).astype(np.int8)
    return made


def code_keys(keys: Array, channels: Array, bits: int) -> tuple[Array, Array]:
    """keys (Hkv, D, n), channels (2, Hkv, D) -> packed (Hkv, D', n), scales (Hkv, n)."""
    centre, spread = channels[0, :, :, None], channels[1, :, :, None]
    codes, scales = quantize((keys - centre) / spread, bits, axis=1)
    return pack(codes, bits, axis=1), scales


def keys_of(packed: Array, scales: Array, channels: Array, bits: int) -> Array:
    centre, spread = channels[0, :, :, None], channels[1, :, :, None]
    made: Array = dequantize(unpack(packed, bits, axis=1), scales, axis=1) * spread + centre
    return made


def code_values(values: Array, bits: int) -> tuple[Array, Array]:
    """values (Hkv, n, D) -> packed (Hkv, n, D'), scales (Hkv, n)."""
    codes, scales = quantize(values, bits, axis=2)
    return pack(codes, bits, axis=2), scales


def values_of(packed: Array, scales: Array, bits: int) -> Array:
    return dequantize(unpack(packed, bits, axis=2), scales, axis=2)


def turn_back(keys: Array, cos: Array, sin: Array) -> Array:
    """keys (Hkv, D, n), cos and sin (Hkv, D/2, n) -> (Hkv, D, n): `graphs.rope.turn_back`."""
    first, second = np.split(keys, 2, axis=1)
    turned = [first * cos + second * sin, second * cos - first * sin]
    return np.concatenate(turned, axis=1)
