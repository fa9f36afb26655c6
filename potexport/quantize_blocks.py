"""The precision `w4`: 4-bit weights in blocks, float activations.

ONNX Runtime's MatMulNBits, which the HTP takes with float activations; everything else stays as it
is, the pot too. Where the weights are not a multiple of a block deep, they stay float.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport.n_bit import BLOCK
from potexport.spec import MODEL_GRAPHS
from potexport.surgery import CONTRIB, Weights, products_in_blocks, take_output, typed


def w4(models: Mapping[str, ir.Model]) -> None:
    """Give the model graphs' matrix products 4-bit weights, in blocks with a scale each, in place.

    A head that shares the embedding gets codes of its own, of 8 bits: with 4 it costs
    SmolLM2 an eighth of perplexity more. The embedding stays float, for rows are looked up in it.
    """
    weights = Weights()
    for name, model in models.items():
        if name not in MODEL_GRAPHS:
            continue
        for node, weight in products_in_blocks(model.graph, BLOCK):  # the HTP takes no others
            _as_blocks(model.graph, node, weight, weights)
        model.opset_imports[CONTRIB] = 1
        passes.RemoveUnusedNodesPass()(model)


def _as_blocks(graph: ir.Graph, node: ir.Node, weight: ir.Value, weights: Weights) -> None:
    """x @ W -> MatMulNBits(x, blocks, scales)."""
    head = node.op_type == "Gemm"
    bits = 8 if head else 4
    codes, scales = (f"{weight.name}.{kind}" for kind in (f"int{bits}", "scales"))
    if not weights.has(codes):
        assert weight.const_value is not None
        matrix = weight.const_value.numpy()
        blocks, steps = n_bits(matrix.T if head else matrix, bits)
        weights.put(codes, blocks)
        weights.put(scales, steps.astype(matrix.dtype))
    columns, rows, _ = weights.shape(codes)
    x, y = _of_rank_three(node) if head else (node.inputs[0], node.outputs[0])
    product = ir.node(
        "MatMulNBits",
        [x, weights.value(graph, codes), weights.value(graph, scales)],
        attributes={"K": rows * BLOCK, "N": columns, "bits": bits, "block_size": BLOCK},
        domain=CONTRIB,
    )
    graph.insert_before(node, product)
    new = typed(product.outputs[0], y)
    if y.is_graph_output():
        take_output(graph, y, new)
    y.replace_all_uses_with(new)


def _of_rank_three(gemm: ir.Node) -> tuple[ir.Value, ir.Value]:
    """What goes into the Reshape before a head's Gemm, and what comes out of the one behind it.

    The HTP takes MatMulNBits of (1, T, D), and refuses it of (T, D).
    """
    before = None if gemm.inputs[0] is None else gemm.inputs[0].producer()
    (after,) = gemm.outputs[0].consumers()
    kinds = {before.op_type if before else "nothing", after.op_type}
    x = before.inputs[0] if before else None
    if kinds != {"Reshape"} or x is None:
        raise RuntimeError(f"expected a head's Gemm between two Reshapes, found {kinds}")
    return x, after.outputs[0]


def n_bits(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(in, out) -> packed codes (out, in / BLOCK, BLOCK * bits / 8) uint8 and scales (out, in /
    BLOCK) float32, symmetric, as ONNX Runtime's quantizer packs them."""
    with _logging_untouched():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    settings = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    # Of fp16 weights its kernel makes nothing but zeros.
    whole = np.ascontiguousarray(matrix, np.float32)
    packed, scales, _ = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(whole)
    return packed, scales


@contextmanager
def _logging_untouched() -> Iterator[None]:
    """ONNX Runtime's quantizer makes the whole process log to stderr when it is imported."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
