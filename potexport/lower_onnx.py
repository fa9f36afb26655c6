"""From the traced models to the graphs of the contract: cut to one graph, made static, cleaned."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from potexport.graphs.in_place import CHOOSE
from potexport.spec import GraphSpec
from potexport.surgery import constant, replace


def simplify(model: ir.Model) -> ir.Model:
    """Fold constants and drop what the exporter leaves behind; meaning and names of the signature
    stay.

    The general rewrite rules of onnxscript's optimizer are left out: they match some 40 patterns at
    every node, which is nine tenths of its time, and none of them fires on these graphs.
    """
    passes.ClearMetadataAndDocStringPass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    for clean in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        clean(model)
    return model


def _transposed_weights(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value]]:
    """Every Transpose of a weight, with that weight."""
    found = [(node, node.inputs[0]) for node in graph if node.op_type == "Transpose"]
    return [(node, value) for node, value in found if value is not None and value.is_initializer()]


def fold_weight_transposes(model: ir.Model) -> ir.Model:
    """Store a linear layer's weight as MatMul wants it, (in, out); a tied one keeps its layout.

    The transposed array is a view until the weights are written, so nothing is copied here.
    """
    graph = model.graph
    for node, weight in _transposed_weights(graph):
        if len(weight.uses()) > 1 or weight.const_value is None:
            continue
        name = f"{weight.name}.T"
        array = weight.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        folded = ir.Value(
            name=name,
            const_value=ir.Tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=weight.type,
        )
        graph.register_initializer(folded)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
    return model


def cut(model: ir.Model, spec: GraphSpec, *, width: int | None = None) -> ir.Model:
    """One graph of the contract: only its inputs and outputs, in its order, with `width` for the
    symbolic dimension."""
    model = model.clone()
    graph = model.graph
    given = {str(value.name): value for value in graph.inputs}
    made = {str(value.name): value for value in graph.outputs}
    graph.outputs[:] = [made[tensor.name] for tensor in spec.outputs]
    for value in [*given.values(), *(out for node in graph for out in node.outputs)]:
        value.shape = _fixed(value.shape, width)
    graph.name = spec.name
    _choose_attention(graph, fused=not any(t.name.startswith("mass.") for t in spec.outputs))
    model.opset_imports.pop(CHOOSE[0], None)
    simplify(
        model
    )  # folds the width that was read off an input, which may be one that this graph does not have
    wanted = [given.pop(tensor.name) for tensor in spec.inputs]
    still_read = [name for name, value in given.items() if value.uses()]
    if still_read:
        raise RuntimeError(
            f"graph {spec.name} reads {', '.join(still_read)}, which is not in its contract"
        )
    graph.inputs[:] = wanted
    return tie_head(model)


def _choose_attention(graph: ir.Graph, *, fused: bool) -> None:
    """Keep the attention of one operator, or the one in the open, that tells how it was shared."""
    for node in list(graph):
        if (node.domain, node.op_type) == CHOOSE:
            chosen = node.inputs[1 if fused else 0]
            assert chosen is not None
            node.outputs[0].replace_all_uses_with(chosen)
            graph.remove(node, safe=True)


def _fixed(shape: ir.Shape | None, width: int | None) -> ir.Shape | None:
    """The shape at this width; None, to be inferred again, where a dimension is an expression of
    it."""
    if shape is None or shape.is_static() or width is None:
        return shape
    dims = [
        width if isinstance(d, ir.SymbolicDim) and str(d.value).isidentifier() else d for d in shape
    ]
    return ir.Shape(dims) if all(isinstance(d, int) for d in dims) else None


def tie_head(model: ir.Model) -> ir.Model:
    """Let a head that shares the embedding read it as it is: Gemm needs no transposed copy."""
    graph = model.graph
    for node, table in _transposed_weights(graph):
        for product in list(node.outputs[0].consumers()):
            _as_gemm(graph, product, table)
        graph.remove(node, safe=True)
    return model


def _as_gemm(graph: ir.Graph, product: ir.Node, table: ir.Value) -> None:
    """MatMul(x, table^T) -> Reshape, Gemm, Reshape."""
    x, out = product.inputs[0], product.outputs[0]
    if product.op_type != "MatMul" or x is None or x.shape is None or table.shape is None:
        raise RuntimeError(f"expected a MatMul of known shape on a tied weight, found {product}")
    *lead, size = x.shape.numpy()
    columns = table.shape.numpy()[0]
    rows = constant(graph, f"{out.name}.rows", np.array([int(np.prod(lead)), size]))
    back = constant(graph, f"{out.name}.back", np.array([*lead, columns]))
    flatten = ir.node("Reshape", [x, rows])
    gemm = ir.node("Gemm", [flatten.outputs[0], table], attributes={"transB": 1})
    for node, width in ((flatten, size), (gemm, columns)):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([int(np.prod(lead)), width]), x.type
    restore = ir.node("Reshape", [gemm.outputs[0], back])
    replace(graph, out, [flatten, gemm, restore], before=product)
    graph.remove(product, safe=True)
