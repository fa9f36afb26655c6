"""What Qualcomm's HTP wants written differently: same function, other operators.

A bundle's graphs stay as they are, portable; these rewrites are made on the way into the HTP's
compiler. The HTP computes in fp16 whatever a graph says, and is silent where that goes wrong, so
each rewrite names what was seen. Every function returns how often it fired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport.spec import EMBEDDED
from potexport.surgery import constant, replace

LARGEST_BLOCK = 4096  # columns
LOWEST_EXPONENT = -30.0


@dataclass(frozen=True)
class Lowered:
    """fired: name of a rewrite -> how often. embedding: the weight whose rows the host gives."""

    fired: dict[str, int]
    embedding: str | None


def lower(model: ir.Model) -> Lowered:
    """Rewrite in place."""
    looked_up = _embedding(model.graph)
    table = looked_up.inputs[0] if looked_up else None
    fired = {
        "RMS norms fused": fuse_rms_norms(model.graph),
        "norms of heads as rows": flatten_norms(model.graph),
        "log-softmaxes in blocks": block_log_softmax(model.graph),
        "embeddings left to the host": embed_on_host(model.graph),
    }
    passes.RemoveUnusedNodesPass()(model)
    return Lowered(fired, table.name if table else None)


def embed_on_host(graph: ir.Graph) -> int:
    """Take rows of the embedding table as an input, instead of ids and the table.

    A row is copied, not computed with, so the host does it from the file of weights. Inside, the
    HTP would hold a table of its own beside the head's, even where the model has one for both:
    SmolLM2's contexts were 1.25 times its weights.
    """
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    looked_up = _embedding(graph)
    if ids is None or looked_up is None:
        return 0
    rows = looked_up.outputs[0]
    given = ir.Value(name=EMBEDDED, shape=rows.shape, type=rows.type)
    rows.replace_all_uses_with(given)
    graph.inputs[list(graph.inputs).index(ids)] = given
    graph.remove(looked_up, safe=True)
    return 1


def _embedding(graph: ir.Graph) -> ir.Node | None:
    """The Gather of `input_ids` from a table, if nothing else reads the ids."""
    readers = [node for node in graph for value in node.inputs if _named(value, "input_ids")]
    if len(readers) != 1 or readers[0].op_type != "Gather":
        return None
    table, axis = readers[0].inputs[0], readers[0].attributes.get("axis")
    is_lookup = table is not None and table.is_initializer() and (axis is None or not axis.value)
    return readers[0] if is_lookup else None


def _named(value: ir.Value | None, name: str) -> bool:
    return value is not None and value.name == name


def fuse_rms_norms(graph: ir.Graph) -> int:
    """x * (mean(x^2) + eps)^-1/2, and its weight, as one RMSNormalization.

    Written out, x^2 leaves fp16 where |x| > 255, as residuals of real models are: SmolLM2's logits
    were off by half. The one operator was right up to |x| = 60,000.
    """
    norms = [norm for node in graph if (norm := _rms_norm(node)) is not None]
    for x, epsilon, y, last in norms:
        y, weight = _weighted(y, x)
        scale = _scale(graph, weight, x, name=f"{y.name}.scale")
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        fused = ir.node("RMSNormalization", [x, scale], attributes=attributes)
        replace(graph, y, [fused], before=last)
    return len(norms)


def _scale(graph: ir.Graph, weight: ir.Value | None, x: ir.Value, *, name: str) -> ir.Value:
    """The weight in x's type, or ones."""
    assert x.dtype is not None
    tensor = None if weight is None else weight.const_value
    if weight is not None and weight.dtype == x.dtype:
        return weight
    array = np.ones(_shape(x)[-1]) if tensor is None else tensor.numpy()
    return constant(graph, name, array.astype(x.dtype.numpy()))


def flatten_norms(graph: ir.Graph) -> int:
    """Give RMSNormalization three dimensions, as where it normalises each head's queries and keys.

    Over (1, T, H, D) with T > 8 the HTP's rows from the ninth on are of other tokens.
    """
    deep = [
        node
        for node in graph
        if node.op_type == "RMSNormalization"
        and node.inputs[0] is not None
        and len(_shape(node.inputs[0])) > 3
    ]
    for node in deep:
        x, scale, y = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None
        shape = _shape(x)
        rows = constant(graph, f"{y.name}.rows", np.array([1, -1, shape[-1]]))
        back = constant(graph, f"{y.name}.back", np.array(shape))
        flat = ir.node("Reshape", [x, rows])
        flat.outputs[0].type = x.type
        flat.outputs[0].shape = ir.Shape([1, int(np.prod(shape[:-1])), shape[-1]])
        norm = ir.node("RMSNormalization", [flat.outputs[0], scale], attributes=node.attributes)
        replace(graph, y, [flat, norm, ir.node("Reshape", [norm.outputs[0], back])], before=node)
    return len(deep)


def _rms_norm(node: ir.Node) -> tuple[ir.Value, float, ir.Value, ir.Node] | None:
    """x, epsilon, the normalised value and the node after which all of it is known, if `node` is
    the Reciprocal of an RMS norm over the last axis."""
    add = _maker(_maker(node, "Reciprocal", 0), "Sqrt", 0)
    mean = _maker(add, "Add", 0)
    square = _maker(mean, "ReduceMean", 0)
    if add is None or mean is None or square is None or square.op_type != "Pow":
        return None
    exponent, axes, epsilon = (
        _number(each) for each in (square.inputs[1], mean.inputs[1], add.inputs[1])
    )
    x = square.inputs[0]
    if exponent != 2 or axes != -1 or epsilon is None or x is None:
        return None
    products = [n for n in node.outputs[0].consumers() if n.op_type == "Mul" and x in n.inputs]
    if len(products) != 1 or len(node.outputs[0].uses()) != 1:
        return None
    y = products[0].outputs[0]
    before = x.producer()
    source = before.inputs[0] if before is not None and before.op_type == "Cast" else None
    # A norm in fp32 inside a model in fp16: x is cast, and y is cast back.
    back = [n.outputs[0].dtype for n in y.consumers() if n.op_type == "Cast"]
    return source if source is not None and source.dtype in back else x, epsilon, y, products[0]


def _weighted(y: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Follow y through the Cast back to x's type and the product with a weight, where they are."""
    weight = None
    while y.dtype != x.dtype or weight is None:
        consumers = y.consumers()
        if len(consumers) != 1 or y.is_graph_output():
            break
        following = consumers[0]
        others = [each for each in following.inputs if each is not y]
        other = others[0] if others else None
        if following.op_type == "Cast" and following.outputs[0].dtype == x.dtype != y.dtype:
            y = following.outputs[0]
        elif (
            following.op_type == "Mul"
            and weight is None
            and other is not None
            and other.is_initializer()
            and _shape(other) == _shape(x)[-1:]
        ):
            weight, y = other, following.outputs[0]
        else:
            break
    return y, weight


def block_log_softmax(graph: ir.Graph) -> int:
    """GatherElements(LogSoftmax(x)) over a row of a whole vocabulary, as sums over blocks of it.

    Behind a head of 49,152 columns the compiler takes a minute for a reduction over whole rows and
    seconds for the same in blocks. Exponents are clipped: below -88 the HTP's Exp gives -131008.
    """
    found = [
        (node, chosen)
        for node in graph
        if node.op_type == "LogSoftmax"
        for chosen in [_only_consumer(node.outputs[0])]
        if chosen is not None and chosen.op_type == "GatherElements"
    ]
    for node, chosen in found:
        x, index = node.inputs[0], chosen.inputs[1]
        assert x is not None
        assert x.dtype is not None
        *lead, columns = _shape(x)
        width = next(w for w in range(min(columns, LARGEST_BLOCK), 0, -1) if columns % w == 0)
        name = chosen.outputs[0].name
        shape = constant(graph, f"{name}.blocks", np.array([*lead, columns // width, width]))
        last = constant(graph, f"{name}.last", np.array([-1]))
        floor = constant(graph, f"{name}.floor", np.array(LOWEST_EXPONENT, x.dtype.numpy()))
        blocks = ir.node("Reshape", [x, shape])
        tops = ir.node("ReduceMax", [blocks.outputs[0], last], attributes={"keepdims": 0})
        top = ir.node("ReduceMax", [tops.outputs[0], last], attributes={"keepdims": 1})
        wide = ir.node("Unsqueeze", [top.outputs[0], last])
        below = ir.node("Sub", [blocks.outputs[0], wide.outputs[0]])
        clipped = ir.node("Max", [below.outputs[0], floor])
        powers = ir.node("Exp", [clipped.outputs[0]])
        sums = ir.node("ReduceSum", [powers.outputs[0], last], attributes={"keepdims": 0})
        total = ir.node("ReduceSum", [sums.outputs[0], last], attributes={"keepdims": 1})
        log = ir.node("Log", [total.outputs[0]])
        picked = ir.node("GatherElements", [x, index], attributes={"axis": -1})
        less = ir.node("Sub", [picked.outputs[0], top.outputs[0]])
        result = ir.node("Sub", [less.outputs[0], log.outputs[0]])
        made = [blocks, tops, top, wide, below, clipped, powers, sums, total, log, picked, less]
        replace(graph, chosen.outputs[0], [*made, result], before=chosen)
    return len(found)


def _maker(node: ir.Node | None, op_type: str, index: int) -> ir.Node | None:
    """The node that makes an input of `node`, if that is of the given type."""
    if node is None or node.op_type != op_type:
        return None
    value = node.inputs[index]
    return None if value is None else value.producer()


def _only_consumer(value: ir.Value) -> ir.Node | None:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()
