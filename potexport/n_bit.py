"""Weights as n-bit codes in blocks, without a second rounding where they were codes before.

A checkpoint's weights may come from blocks of 32 themselves (GGUF's Q4_0, Q4_1, Q8_0): numbers on
a grid. A block's ends lie on that grid, so it is found again from the numbers alone, whoever read
them and however their rows were permuted; what is coded on it is coded exactly.

numpy alone. Letters: N columns of the product (rows here), K its depth, B = K / 32 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 32
EXACT = 1e-5  # of a block's largest: what float16 scales and float32 sums leave


@dataclass(frozen=True)
class Blocks:
    """w = scale * (code - zero), as ONNX Runtime's MatMulNBits has it.

    codes: (N, B, 32 * bits / 8) uint8, the lower half of a byte first. scales: (N, B) float32.
    zeros: (N, ceil(B / 2)) uint8, two a byte, or None where all are 2^(bits - 1).
    sums: how many of the B blocks multiply sums of blocks of the input and not the input itself.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    sums: int = 0


def eight(matrix: Array) -> Blocks:
    """8 bits, symmetric, of (N, K) float32; exact for Q8_0."""
    blocks = _in_blocks(matrix)
    scales = np.abs(blocks).max(axis=-1) / 127
    codes = np.rint(blocks / _or_one(scales)[..., None]) + 128
    return Blocks(codes.astype(np.uint8), scales.astype(np.float32))


def four(matrix: Array) -> Blocks:
    """4 bits, of (N, K) float32; exact for Q4_0, and but for a hundredth of a step for Q4_1.

    16 steps from a block's least number to its largest rarely pass through 0, as whole zero points
    want it: with these alone SmolLM2's perplexity is a fifth higher. What they leave, one number a
    block, is multiplied by the sum of the input's block; it is stored as 4-bit blocks of its own,
    which stand behind the others (`sums`).
    """
    blocks = _in_blocks(matrix)
    plain = _symmetric(blocks)
    return plain if plain is not None else _with_sums(blocks)


def columns(matrix: Array) -> tuple[Array, Array]:
    """8 bits, symmetric, one scale a column, of (N, K) float32: codes (K, N) int8, scales (N,)
    float32."""
    scales = np.abs(matrix).max(axis=1) / 127
    codes = np.rint(matrix / _or_one(scales)[:, None]).astype(np.int8)
    return np.ascontiguousarray(codes.T), scales.astype(np.float32)


def sums_of(size: int) -> Array:
    """(K, 32 * sums) float32: x @ this are the sums of x's blocks, as `Blocks.sums` wants them."""
    count = size // BLOCK
    made = np.zeros((size, _padded(count)), np.float32)
    made[np.arange(size), np.arange(size) // BLOCK] = 1
    return made


def _symmetric(blocks: Array) -> Blocks | None:
    """Codes from -8 to 7 of one scale a block, if all blocks are just that (Q4_0)."""
    scales = _symmetric_scales(blocks[:8])
    if not _on_grid(blocks[:8], scales):  # most matrices are none, and told apart at once
        return None
    scales = _symmetric_scales(blocks)
    if not _on_grid(blocks, scales):
        return None
    codes = np.rint(blocks / _or_one(scales)[..., None]) + 8
    return Blocks(_packed(codes), scales.astype(np.float32))


def _symmetric_scales(blocks: Array) -> Array:
    largest = np.abs(blocks).argmax(axis=-1)[..., None]
    return np.take_along_axis(blocks, largest, axis=-1)[..., 0] / -8


def _on_grid(blocks: Array, scales: Array) -> bool:
    codes = np.clip(np.rint(blocks / _or_one(scales)[..., None]), -8, 7)
    off = np.abs(codes * scales[..., None] - blocks)
    return bool((off <= EXACT * np.abs(blocks).max(axis=-1, keepdims=True)).all())


def _with_sums(blocks: Array) -> Blocks:
    least = np.minimum(blocks.min(axis=-1), 0)
    scales = (np.maximum(blocks.max(axis=-1), 0) - least) / 15
    scales = _or_one(scales)
    codes = np.rint((blocks - least[..., None]) / scales[..., None])
    zeros = np.rint(-least / scales)
    left = least + zeros * scales  # (N, B), within half a step
    count = left.shape[1]
    rest = np.zeros((left.shape[0], _padded(count)), np.float32)
    rest[:, :count] = left
    rest = rest.reshape(left.shape[0], -1, BLOCK)
    rest_scales = np.abs(rest).max(axis=-1) / 7
    rest_codes = np.rint(rest / _or_one(rest_scales)[..., None]) + 8
    return Blocks(
        np.concatenate([_packed(codes), _packed(rest_codes)], axis=1),
        np.concatenate([scales, rest_scales], axis=1).astype(np.float32),
        _packed_zeros(np.concatenate([zeros, np.full(rest_scales.shape, 8)], axis=1)),
        rest.shape[1],
    )


def decoded(blocks: Blocks, bits: int) -> Array:
    """(N, K) float32: what the codes stand for, the sums' share included."""
    codes = blocks.codes
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], BLOCK)
    count = codes.shape[1]
    zeros: Array = np.full((codes.shape[0], count), 1 << (bits - 1))
    if blocks.zeros is not None:
        pairs = np.stack([blocks.zeros & 15, blocks.zeros >> 4], axis=-1)
        zeros = pairs.reshape(codes.shape[0], -1)[:, :count]
    numbers = (codes.astype(np.float32) - zeros[..., None]) * blocks.scales[..., None]
    own = count - blocks.sums
    if blocks.sums:
        left = numbers[:, own:].reshape(codes.shape[0], -1)[:, :own]
        numbers = numbers[:, :own] + left[..., None]
    made: Array = numbers.reshape(codes.shape[0], -1).astype(np.float32)
    return made


def _in_blocks(matrix: Array) -> Array:
    return np.ascontiguousarray(matrix, np.float32).reshape(matrix.shape[0], -1, BLOCK)


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _or_one(scales: Array) -> Array:
    return np.where(scales == 0, 1, scales)


def _packed(codes: Array) -> Array:
    """(N, B, 32) from 0 to 15 -> (N, B, 16) uint8."""
    whole = np.clip(codes, 0, 15).astype(np.uint8)
    made: Array = whole[..., 0::2] | (whole[..., 1::2] << 4)
    return made


def _packed_zeros(zeros: Array) -> Array:
    """(N, B) from 0 to 15 -> (N, ceil(B / 2)) uint8."""
    whole = np.clip(zeros, 0, 15).astype(np.uint8)
    if whole.shape[1] % 2:
        whole = np.concatenate([whole, np.zeros((whole.shape[0], 1), np.uint8)], axis=1)
    made: Array = whole[:, 0::2] | (whole[:, 1::2] << 4)
    return made
