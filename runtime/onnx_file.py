"""What an ONNX file of a bundle may hold, looked at before ONNX Runtime is given it.

An ONNX file is a protocol buffer, of which only what is asked about is read here; the package onnx
is not among what a phone needs. Allowed is what our own builds write: operators of two domains, no
graph within a graph, no function, no weight but in the bundle's own weights file. What constants
alone make must be small, for ONNX Runtime computes it as it loads the file, in memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from potexport import strict
from potexport.errors import PotexportError
from potexport.runtime.template import one_line

LARGEST = 64 << 20  # bytes; ours have some hundred thousand, and a few million of tables
MOST_NODES = 1 << 18
MOST_INLINE = 1 << 24  # bytes of all tensors that are not in the weights file
# By domain; the second is ONNX Runtime's own.
PLAIN = b"""
    Abs Add And ArgMax AveragePool Cast Clip Concat Conv Cos CumSum DequantizeLinear Div Einsum
    Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsNaN LayerNormalization Less LessOrEqual Log
    LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not Or Pad Pow QuantizeLinear
    RMSNormalization Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum
    ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Sigmoid Sign
    SimplifiedLayerNormalization Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish
    Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
""".split()
FUSED = b"""
    BiasGelu DequantizeLinear DynamicQuantizeMatMul FastGelu FusedMatMul GatherBlockQuantized
    Gelu GroupQueryAttention MatMulIntegerToFloat MatMulNBits QuantizeLinear QuickGelu
    RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization
""".split()
OPERATORS: Mapping[bytes, frozenset[bytes]] = {
    b"": frozenset(PLAIN),
    b"com.microsoft": frozenset(FUSED),
}
# On constants: make as many numbers as the first has, or at most the product of all.
KEEPING = frozenset(
    b"""
    Abs Cast Clip DequantizeLinear Floor Identity Neg Not QuantizeLinear Reciprocal Reshape
    Round Sign Slice Sqrt Squeeze Transpose Trilu Unsqueeze
    """.split()
)
BROADCASTING = frozenset(
    b"Add And Concat Div Equal Gather Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or "
    b"Pow Sub Sum Where Xor".split()
)
MOST_MADE = 1 << 22  # numbers that constants make together, beside as many as there are weights
EXTERNAL, STRING = 1, 8  # of TensorProto: a data_location, a data_type
Fields = Iterator[tuple[int, int, bytes]]


def check(path: Path, weights: str) -> None:
    """PotexportError for a file that has what no bundle of ours has.

    weights: the one file whose bytes it may refer to.
    """
    try:
        _check_model(strict.content(path, LARGEST), weights.encode())
    except (OSError, ValueError, IndexError) as error:
        raise PotexportError(
            f"{path} is no graph of a bundle: {one_line(error)}; build the bundle again"
        ) from error


def _fields(data: bytes) -> Fields:
    """The fields of a message: (number, value if it is a number, value if it is bytes)."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _number(data, at)
        kind, value, part = tag & 7, 0, b""
        if kind == 0:
            value, at = _number(data, at)
        elif kind == 2:
            size, at = _number(data, at)
            part, at = data[at : at + size], at + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of type {kind}")
        if at > end:
            raise ValueError("it is cut short")
        yield tag >> 3, value, part


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("it has a number of more than 64 bits")


def _check_model(data: bytes, weights: bytes) -> None:
    """Fields of ModelProto: 7 graph, 8 opset_import (1 domain), 25 functions."""
    for number, _, part in _fields(data):
        if number == 25:
            raise ValueError("it has functions")
        if number == 8:
            domain = next((value for n, _, value in _fields(part) if n == 1), b"")
            if domain not in OPERATORS and domain != b"ai.onnx":
                raise ValueError(f"it uses the operators of {domain[:60]!r}")
        if number == 7:
            _check_graph(part, weights)


def _check_graph(data: bytes, weights: bytes) -> None:
    """Fields of GraphProto: 1 node, 5 initializer, 11 input, 15 sparse_initializer."""
    nodes: list[bytes] = []
    known: set[bytes] = set()  # names that have a value
    constants: dict[bytes, int] = {}  # how many numbers each has at most
    inline = 0
    for number, _, part in _fields(data):
        if number == 1:
            nodes.append(part)
        elif number == 5:
            name, size, constants[name] = _check_tensor(part, weights)
            inline += size
        elif number == 11:
            known.add(next((name for n, _, name in _fields(part) if n == 1), b""))
        elif number == 15:
            raise ValueError("it has sparse weights")
    if len(nodes) > MOST_NODES or inline > MOST_INLINE:
        raise ValueError(f"it has {len(nodes)} nodes, and {inline} bytes of weights within it")
    given = sum(constants.values())
    known.update(constants)
    for node in nodes:
        _check_node(node, constants, known)
    made = sum(constants.values()) - given
    if made > given + MOST_MADE:
        raise ValueError(f"its constants make {made} numbers")


def _check_node(data: bytes, constants: dict[bytes, int], known: set[bytes]) -> None:
    """Fields of NodeProto: 1 input, 2 output, 4 op_type, 5 attribute, 7 domain. constants: of what
    has a value before the graph runs; this node's outputs are added to both."""
    inputs: list[bytes] = []
    outputs: list[bytes] = []
    operator = domain = b""
    for number, _, part in _fields(data):
        if number == 1 and part:
            inputs.append(part)
        elif number == 2:
            outputs.append(part)
        elif number == 4:
            operator = part
        elif number == 5:
            _check_attribute(part)
        elif number == 7:
            domain = part
    if operator not in OPERATORS.get(b"" if domain == b"ai.onnx" else domain, ()):
        raise ValueError(f"it has the operator {operator[:60]!r} of {domain[:60]!r}")
    if not known.issuperset(inputs):  # of a later node: then nobody could say what is constant
        raise ValueError(f"it has a {operator!r} of what is not made yet")
    known.update(outputs)
    if all(name in constants for name in inputs):
        sizes = [constants[name] for name in inputs] or [0]
        if operator not in KEEPING | BROADCASTING:
            raise ValueError(f"it has the operator {operator!r} on constants")
        made = sizes[0] if operator in KEEPING else prod(max(size, 1) for size in sizes)
        if operator in BROADCASTING and made > MOST_MADE:
            raise ValueError(f"its constants make {made} numbers")
        constants.update(dict.fromkeys(outputs, made))


def _check_attribute(data: bytes) -> None:
    """Fields of AttributeProto: 5 t, 6 g, 10 tensors, 11 graphs, 22 and 23 sparse tensors."""
    for number, _, _ in _fields(data):
        if number in (5, 6, 10, 11, 22, 23):
            raise ValueError("it has a graph or a tensor within a node")


def _check_tensor(data: bytes, weights: bytes) -> tuple[bytes, int, int]:
    """Of a TensorProto: its name; its bytes within the file, 0 where it is in the weights file; how
    many numbers it has.

    Fields: 1 dims, 2 data_type, 8 name, 9 raw_data, 13 external_data, 14 data_location; the other
    data fields are those of small tensors.
    """
    name, where, size = b"", 0, 0
    shape: list[int] = []
    said: list[bytes] = []
    for number, value, part in _fields(data):
        if number == 1:
            shape += _packed(part) if part else [value]
        elif number == 2 and value == STRING:
            raise ValueError("it has a tensor of texts")
        elif number == 8:
            name = part
        elif number == 13:
            said.append(part)
        elif number == 14:
            where = value
        else:
            size += len(part)
    entries = [{n: value for n, _, value in _fields(each)} for each in said]
    locations = [each.get(2, b"") for each in entries if each.get(1) == b"location"]
    if (where == EXTERNAL or said) and locations != [weights]:
        raise ValueError(f"the weight {name[:60]!r} is in {b', '.join(locations)[:60]!r}")
    return name, size, prod(shape)


def _packed(data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _number(data, at)
        found.append(value)
    return found
