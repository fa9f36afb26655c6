"""The precision `a16w8`: 16-bit activations, 8-bit weights, and a pot of 16-bit codes.

Every matrix product with a weight gets 16-bit inputs and outputs and 8-bit weights, in the form
that ONNX Runtime's QNN provider reads: QuantizeLinear and DequantizeLinear around it. What lies
between them (norms, rotation, attention over the pot, residual sums, log-probabilities, masks)
stays float, fp16 on the HTP: SmolLM2's residual stream reaches 20,000 in one channel of one token,
where one scale for all of it would be coarser than most of what it holds.

Graphs are float32 where they are not codes: an fp16 number has 11 bits, fewer than a code.

The pot holds codes, uint16, with one scale for each layer's keys and one for its values, the same
in all graphs and for a slot's whole life. The host copies codes and never reads them. A compression
moves values as codes, exactly. Keys it turns: codes to numbers, rotation, and back, which rounds by
half a step each time. A rotation may raise one coordinate by the square root of 2, so the keys'
scale comes from the largest norm of a rotated pair, which no rotation changes (`calibrate`): no
number of compressions ever clips a key.

Not ONNX Runtime's own quantizer: it takes one serialized model at a time, so that three graphs
would get three copies of the weights, and calibrates by running that model alone, without the loop.
The arithmetic and the form are its own; a test holds them against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport.spec import MODEL_GRAPHS
from potexport.surgery import Weights, initializer, products, take_output, typed

if TYPE_CHECKING:
    from potexport.calibrate import Product, Ranges

MIDDLE, CODES = 32768, 65536  # uint16: the code of zero, and how many there are
HEADROOM = 1.5  # ranges may exceed what calibration saw by so much before they are clipped
# A product stays float where one 16-bit step is more than this of what the median channel holds.
# SmolLM2: 2 of 211, the down projections that make its massive activations (0.52 and 0.15; else
# 0.03 at most). Quantized all the same, they add 0.4% to the perplexity.
COARSE = 0.05
LARGEST_FLOAT = 16384.0  # of constants: finite in fp16, whatever is added
MOVES = ("Reshape", "Transpose", "Gather", "Unsqueeze", "Squeeze")
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Scale:
    """Steps of uint16 codes around MIDDLE, under a name that is unique in a graph."""

    name: str
    step: float

    @classmethod
    def of(cls, name: str, largest: float) -> Scale:
        return cls(name, float(np.float32(2 * HEADROOM * max(largest, 1e-6) / (CODES - 1))))


def a16w8(models: Mapping[str, ir.Model], ranges: Ranges) -> None:
    """Quantize the float32 graphs of a bundle in place."""
    weights = Weights()
    scales = pot_scales(ranges)
    for name, model in models.items():
        graph = model.graph
        if name in MODEL_GRAPHS:
            for node, weight in list(products(graph)):
                seen = ranges.products[_checkpoint_name(weight)]
                if not coarse(seen):
                    _quantize_product(graph, node, weight, seen, weights)
            _halve_floats(graph, weights)
        _bound_constants(graph)
        _pot_inputs(graph, scales)
        _move_codes(graph)
        _pot_outputs(graph, scales)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)


def pot_scales(ranges: Ranges) -> dict[str, Scale]:
    """ "0.key", "0.value", … -> the scale of that part of the pot."""
    found = {}
    for layer, (key, value) in enumerate(zip(ranges.keys, ranges.values, strict=True)):
        found[f"{layer}.key"] = Scale.of(f"pot.{layer}.key.step", key)
        found[f"{layer}.value"] = Scale.of(f"pot.{layer}.value.step", value)
    return found


def coarse(seen: Product) -> bool:
    """Whether 16 bits are too few for what goes in or comes out."""
    return any(2 * each.range / CODES > COARSE * each.typical for each in (seen.x, seen.y))


def eight_bits(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of a matrix and their float32 steps, one for each index of `axis`, symmetric.

    One step for the whole matrix costs SmolLM2 7% of perplexity, one for each column 0.3%.
    """
    largest = np.abs(array).max(axis=1 - axis, keepdims=True)
    steps = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
    return np.rint(array / steps).astype(np.int8), steps.reshape(-1)


def _checkpoint_name(weight: ir.Value) -> str:
    return str(weight.name).removesuffix(".T")


def _quantize_product(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, seen: Product, weights: Weights
) -> None:
    """x @ W -> DQ(Q(DQ(Q(x)) @ DQ(codes of W))); x that feeds several products gets one pair."""
    x, y, name = node.inputs[0], node.outputs[0], str(weight.name)
    assert x is not None
    axis = 0 if node.op_type == "Gemm" else 1
    codes, steps, zeros = f"{name}.int8", f"{name}.steps", f"{name}.zeros"
    if not weights.has(codes):
        assert weight.const_value is not None
        array, scale = eight_bits(weight.const_value.numpy(), axis)
        weights.put(codes, array)
        weights.put(steps, scale)
        weights.put(zeros, np.zeros(scale.shape, np.int8))
    inputs = [weights.value(graph, each) for each in (codes, steps, zeros)]
    back = ir.node("DequantizeLinear", inputs, attributes={"axis": axis})
    graph.insert_before(node, back)
    node.replace_input_with(1, typed(back.outputs[0], weight))
    node.replace_input_with(
        0, _paired_input(graph, node, x, Scale.of(f"{x.name}.step", seen.x.range))
    )
    users = list(y.uses())
    _, result = _pair(graph, y, Scale.of(f"{name}.y.step", seen.y.range), after=node)
    for user, index in users:
        user.replace_input_with(index, result)
    if y.is_graph_output():
        take_output(graph, y, result)


def _paired_input(graph: ir.Graph, node: ir.Node, x: ir.Value, scale: Scale) -> ir.Value:
    """x through codes and back; the pair that is there already, if another product made it."""
    for user, _ in x.uses():
        if user.op_type == "QuantizeLinear":
            return next(iter(user.outputs[0].consumers())).outputs[0]
    nodes = _pair_nodes(graph, x, scale)
    graph.insert_before(node, nodes)
    return nodes[1].outputs[0]


def _pair(
    graph: ir.Graph, x: ir.Value, scale: Scale, *, after: ir.Node
) -> tuple[ir.Value, ir.Value]:
    """Codes of x, and x again from them."""
    nodes = _pair_nodes(graph, x, scale)
    graph.insert_after(after, nodes)
    return nodes[0].outputs[0], nodes[1].outputs[0]


def _pair_nodes(graph: ir.Graph, x: ir.Value, scale: Scale) -> list[ir.Node]:
    step, zero = _scale_inputs(graph, scale)
    quantize = ir.node("QuantizeLinear", [x, step, zero])
    codes = typed(quantize.outputs[0], x, ir.DataType.UINT16)
    back = ir.node("DequantizeLinear", [codes, step, zero])
    typed(back.outputs[0], x)
    return [quantize, back]


def _scale_inputs(graph: ir.Graph, scale: Scale) -> tuple[ir.Value, ir.Value]:
    step = initializer(graph, ir.Tensor(np.array(scale.step, np.float32), name=scale.name))
    zero = initializer(graph, ir.Tensor(np.array(MIDDLE, np.uint16), name="uint16.middle"))
    return step, zero


def _pot_inputs(graph: ir.Graph, scales: Mapping[str, Scale]) -> None:
    """The pot's inputs become codes; what read them reads numbers made of the codes."""
    for value in graph.inputs:
        kind, _, part = str(value.name).partition(".")
        if kind != "past_key_values":
            continue
        uses, real = list(value.uses()), value.dtype
        back = ir.node("DequantizeLinear", [value, *_scale_inputs(graph, scales[part])])
        back.outputs[0].shape, back.outputs[0].type = value.shape, ir.TensorType(real or FLOAT)
        value.type = ir.TensorType(ir.DataType.UINT16)
        for user, index in uses:
            user.replace_input_with(index, back.outputs[0])
        graph.insert_before(graph[0], back)


def _move_codes(graph: ir.Graph) -> None:
    """What moves numbers without changing them moves their codes: with the same scale behind a move
    as before it, a compiler needs no number in between."""
    for node in list(graph):
        before = _decoding(node.inputs[0]) if node.op_type in MOVES else None
        if before is None:
            continue
        y, users = node.outputs[0], list(node.outputs[0].uses())
        step, zero = before.inputs[1:3]
        quantize = ir.node("QuantizeLinear", [y, step, zero])
        codes = typed(quantize.outputs[0], y, ir.DataType.UINT16)
        back = ir.node("DequantizeLinear", [codes, step, zero])
        graph.insert_after(node, [quantize, back])
        result = typed(back.outputs[0], y)
        for user, index in users:
            user.replace_input_with(index, result)
        if y.is_graph_output():
            take_output(graph, y, result)


def _pot_outputs(graph: ir.Graph, scales: Mapping[str, Scale]) -> None:
    """New and kept rows leave as codes."""
    for index, value in enumerate(list(graph.outputs)):
        _, _, part = str(value.name).partition(".")
        if part not in scales:
            continue
        step, zero = _scale_inputs(graph, scales[part])
        made = _decoding(value)
        name, codes = value.name, None if made is None else made.inputs[0]
        if made is None or codes is None or made.inputs[1] is not step:
            quantize = ir.node("QuantizeLinear", [value, step, zero])
            graph.append(quantize)
            codes = typed(quantize.outputs[0], value, ir.DataType.UINT16)
        value.name, codes.name = None, name
        graph.outputs[index] = codes


def _decoding(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes an activation from codes, if that is what makes it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes = node.inputs[0]
    return node if codes is not None and not codes.is_initializer() else None


def _halve_floats(graph: ir.Graph, weights: Weights) -> None:
    """Matrices that stay float are stored as fp16: the embedding, and products kept float."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not value.uses() or ".weight" not in str(value.name):
            continue
        if value.dtype != FLOAT or len(tensor.shape) != 2:
            continue
        name = str(value.name)
        if not weights.has(name):
            weights.put(name, tensor.numpy().astype(np.float16))
        uses = list(value.uses())
        graph.initializers.pop(name)
        half = weights.value(graph, name)
        for user, index in uses:
            rows = user.op_type == "Gather" and index == 0
            cast = ir.node("Cast", [half], attributes={"to": FLOAT})
            if rows:  # only those that were looked up
                y, readers = user.outputs[0], list(user.outputs[0].uses())
                user.replace_input_with(0, half)
                cast.replace_input_with(0, y)
                graph.insert_after(user, cast)
                typed(cast.outputs[0], y)
                y.type = ir.TensorType(ir.DataType.FLOAT16)
                for reader, place in readers:
                    reader.replace_input_with(place, cast.outputs[0])
            else:
                graph.insert_before(user, cast)
                user.replace_input_with(index, typed(cast.outputs[0], value))


def _bound_constants(graph: ir.Graph) -> None:
    """Numbers that stand for minus infinity, within what fp16 holds: the HTP computes in it."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.dtype != FLOAT or tensor.size != 1:
            continue
        number = tensor.numpy()
        if np.abs(number).max() > 65504:
            bounded = np.clip(number, -LARGEST_FLOAT, LARGEST_FLOAT).astype(np.float32)
            value.const_value = ir.Tensor(bounded, name=value.name)
