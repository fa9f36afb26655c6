"""Bytes that one generated token reads, and operations that one token of a prompt takes.

Counted from the graphs themselves, by who reads each weight, so that no size is written by hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from potexport.bundle import Manifest
from potexport.spec import ITEM_BYTES

# They look rows up, the last ones of the rotations: of a weight that nothing else reads, one row
# counts for each token.
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"})
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul")
# Weights pass through these unchanged in number, on their way to a product.
PASSED = frozenset({"DequantizeLinear", "Transpose", "Cast", "Reshape", "Unpack"})


def read_by_a_token(path: Path) -> int:
    """Bytes of weights that a graph which takes one token reads: all, but of a table only what it
    looks up."""
    graph = _graph(path)
    readers = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    total = 0
    for tensor in graph.initializer:
        size, kinds = _bytes(tensor), readers[tensor.name]
        if kinds and kinds <= LOOKUPS and len(tensor.dims) > 1:
            size //= tensor.dims[0]
        total += size if kinds else 0
    return total


def products(path: Path, tokens: int) -> int:
    """Floating-point operations, a token, of the products with weights in a graph that takes so
    many. A head counts for as many positions as it is computed at."""
    graph = _graph(path)
    shapes = {each.name: _shape(each) for each in (*graph.value_info, *graph.output)}
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type in PASSED and first in weights:
            weights[node.output[0]] = weights[first]
        inner = _inner(node, weights)
        if inner:
            out, most = shapes.get(node.output[0], ()), (tokens,)
            columns = inner[1]
            rows = math.prod(out[:-1] or most) if out else tokens
            total += 2 * inner[0] * columns * rows
    return total // tokens


def _inner(node: Any, weights: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Of a product with a weight its numbers of inputs and outputs; None for any other node."""
    if node.op_type == "MatMulNBits":
        found = {each.name: each.i for each in node.attribute}
        return int(found["K"]), int(found["N"])
    if node.op_type in PRODUCTS and node.input[1] in weights:
        rows, columns = weights[node.input[1]][-2:]
        turned = any(each.name == "transB" and each.i for each in node.attribute)
        return (columns, rows) if turned else (rows, columns)
    return None


def pot_bytes(manifest: Manifest) -> int:
    """Keys and values of all slots, what a coded pot needs to read them, and the room for a chunk
    behind a pot that is written in place."""
    return sum(
        math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        for tensor in manifest.graphs["decode"].inputs
        if tensor.name.startswith("past_")
    )


def pot_read(manifest: Manifest) -> int:
    """What one token reads of them: all. Of a pot that is written in place filled slots alone: on
    the way from one compression to the next as many as halfway."""
    whole, pot = pot_bytes(manifest), manifest.pot
    if not manifest.in_place:
        return whole
    return whole * (pot.keep + pot.slots) // (2 * (pot.slots + pot.spare))


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph


def _bytes(tensor: Any) -> int:
    from onnx import TensorProto, helper

    count: int = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.UINT4, TensorProto.INT4):
        return (count + 1) // 2
    return count * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(each.dim_value for each in value.type.tensor_type.shape.dim)
