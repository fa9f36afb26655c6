"""The precisions `w4`, `w8` and `w4-w8` on a CPU: weights of 4 or 8 bits, activations of 8.

ONNX Runtime's MatMulNBits multiplies integers (`accuracy_level` 4), which is what its CPU kernels
are fast at: of SmolLM2 a decode step takes an eighth of the time that it takes with float
arithmetic on the same codes (docs/performance.md). The embedding is looked up in 8-bit codes, the
head's own where they are tied.

`w4-w8` has 4 bits where tokens are generated, which is bound by how many bytes are read, and 8
where text is read, which is bound by arithmetic: a column of weights with one scale, by the integer
products that processors have instructions for (VNNI, AMX). All tokens of a chunk share one scale
there. What comes from norms and attention bears that; behind an activation function a few tokens
are a thousand times larger than the others, so those products stay in blocks, of 8 bits
too: they are the quicker ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport import genai, n_bit
from potexport.n_bit import BLOCK, Blocks
from potexport.spec import MODEL_GRAPHS
from potexport.surgery import CONTRIB, Weights, constant, products_in_blocks, replace

BITS = {"w4": 4, "w8": 8, "w4-w8": 4}
READING = ("prefill", "observe")
# Whose outputs bear one scale for all tokens; a Reshape is what attention in the open ends with.
EVEN = ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "LayerNormalization",
        "GroupQueryAttention", "Reshape")  # fmt: skip
INTEGERS = 4  # accuracy_level


class Quantizer:
    """Codes of a model's weights, made once and given to every graph that asks."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._weights, self._sums = Weights(), dict[str, int]()

    def graph(self, graph: ir.Graph, *, by_column: bool) -> None:
        """by_column: where the input bears it."""
        extended: dict[ir.Value, ir.Value] = {}
        for node, weight in products_in_blocks(graph, BLOCK):
            before = node.inputs[0].producer() if node.inputs[0] else None
            if by_column and before is not None and before.op_type in EVEN:
                self._whole_columns(graph, node, weight)
            else:
                self._product(graph, node, weight, extended, 8 if by_column else self.bits)
        for node in list(graph):
            if node.op_type == "Gather":
                self._lookup(graph, node)

    def _product(
        self,
        graph: ir.Graph,
        node: ir.Node,
        weight: ir.Value,
        extended: dict[ir.Value, ir.Value],
        bits: int,
    ) -> None:
        """x @ W -> MatMulNBits(x, codes, scales)."""
        head = node.op_type == "Gemm" or "lm_head" in str(weight.name)
        bits = 8 if head else bits  # with 4 a head costs SmolLM2 an eighth of perplexity
        name = self._codes(weight, bits, by_row=node.op_type == "Gemm")
        x = node.inputs[0]
        assert x is not None
        assert x.shape is not None
        if self._sums[name]:
            x = extended.get(x) or self._extend(graph, node, x, extended)
        columns, count, _ = self._weights.shape(name)
        inputs = [x, *(self._weights.value(graph, each) for each in (name, f"{name}.scales"))]
        if self._weights.has(f"{name}.zeros"):
            inputs.append(self._weights.value(graph, f"{name}.zeros"))
        product = ir.node(
            "MatMulNBits",
            inputs,
            attributes={
                "K": count * BLOCK,
                "N": columns,
                "bits": bits,
                "block_size": BLOCK,
                "accuracy_level": INTEGERS,
            },
            domain=CONTRIB,
        )
        replace(graph, node.outputs[0], [product], before=node)

    def _whole_columns(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        """x @ W -> DynamicQuantizeMatMul(x, codes, scales)."""
        name = f"{weight.name}.columns"
        if not self._weights.has(name):
            assert weight.const_value is not None
            matrix = weight.const_value.numpy()
            codes, scales = n_bit.columns(matrix if node.op_type == "Gemm" else matrix.T)
            self._weights.put(name, codes)
            self._weights.put(f"{name}.scales", scales)
        constants = (self._weights.value(graph, each) for each in (name, f"{name}.scales"))
        product = ir.node("DynamicQuantizeMatMul", [node.inputs[0], *constants], domain=CONTRIB)
        replace(graph, node.outputs[0], [product], before=node)

    def _codes(self, weight: ir.Value, bits: int, *, by_row: bool) -> str:
        """The name of a weight's codes, of (in, out), or of (out, in) by row."""
        name = f"{weight.name}.int{bits}"
        if not self._weights.has(name):
            assert weight.const_value is not None
            matrix = weight.const_value.numpy()
            matrix = matrix if by_row else matrix.T
            self._put(name, n_bit.eight(matrix) if bits == 8 else n_bit.four(matrix))
        return name

    def _put(self, name: str, blocks: Blocks) -> None:
        self._weights.put(name, blocks.codes)
        self._weights.put(f"{name}.scales", blocks.scales)
        if blocks.zeros is not None:
            self._weights.put(f"{name}.zeros", blocks.zeros)
        self._sums[name] = blocks.sums

    def _extend(
        self, graph: ir.Graph, node: ir.Node, x: ir.Value, extended: dict[ir.Value, ir.Value]
    ) -> ir.Value:
        """x with the sums of its blocks behind it."""
        assert x.shape is not None
        *lead, size = x.shape.numpy()
        table = f"block.sums.{size}"
        if not self._weights.has(table):
            self._weights.put(table, n_bit.sums_of(size))
        sums = ir.node("MatMul", [x, self._weights.value(graph, table)])
        more = self._weights.shape(table)[1]
        sums.outputs[0].shape, sums.outputs[0].type = ir.Shape([*lead, more]), x.type
        both = ir.node("Concat", [x, sums.outputs[0]], attributes={"axis": -1})
        both.outputs[0].shape, both.outputs[0].type = ir.Shape([*lead, size + more]), x.type
        graph.insert_before(node, [sums, both])
        extended[x] = both.outputs[0]
        return extended[x]

    def _lookup(self, graph: ir.Graph, gather: ir.Node) -> None:
        """Rows of the embedding -> of its codes."""
        table, ids = gather.inputs
        if table is None or ids is None or not str(table.name).endswith(".weight"):
            return
        if table.shape is None or len(table.shape) != 2 or table.shape.numpy()[1] % BLOCK:
            return
        name = self._codes(table, 8, by_row=True)
        scales = f"{name}.scales.rows"
        if not self._weights.has(scales):  # as before, but of another rank
            self._weights.put(scales, self._weights.array(f"{name}.scales")[..., None])
        rows = ir.node(
            "GatherBlockQuantized",
            [self._weights.value(graph, name), ids, self._weights.value(graph, scales)],
            attributes={"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2},
            domain=CONTRIB,
        )
        out = gather.outputs[0]
        assert out.shape is not None
        *lead, size = out.shape.numpy()
        rows.outputs[0].shape = ir.Shape([*lead, size // BLOCK, BLOCK])
        rows.outputs[0].type = out.type
        shape = constant(graph, f"embedded.{'.'.join(map(str, lead))}", np.array([*lead, size]))
        flat = ir.node("Reshape", [rows.outputs[0], shape])
        replace(graph, out, [rows, flat], before=gather)


def n_bits(models: Mapping[str, ir.Model], precision: str) -> None:
    """Give the model graphs weights of `precision`, in place; to genai's those that generate."""
    made = Quantizer(BITS[precision])
    for name in (*MODEL_GRAPHS, genai.GRAPH):
        if name in models:
            by_column = precision == "w4-w8" and name in READING
            made.graph(models[name].graph, by_column=by_column)
            models[name].opset_imports[CONTRIB] = 1
            passes.RemoveUnusedNodesPass()(models[name])
