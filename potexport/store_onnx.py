"""Graphs and their weights on disk: one safetensors file that all graphs point into as ONNX
external data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import save_file

from potexport.errors import PotexportError
from potexport.spec import GraphSpec

WEIGHTS = "weights.safetensors"
EXTERNAL_FROM = 1024  # bytes; below, a constant stays in its graph

ELEMENT_TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.UINT16: "uint16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
}
# Operators whose presence would mean that a shape is computed at run time, or that the graph
# branches.
FORBIDDEN = frozenset(
    {
        "Shape",
        "Size",
        "NonZero",
        "Loop",
        "If",
        "Scan",
        "SequenceAt",
        "SplitToSequence",
        "ConstantOfShape",
    }
)


@dataclass(frozen=True)
class Stored:
    """Where a weight lies in the safetensors file, in bytes from its beginning."""

    offset: int
    length: int


def save(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write `<name>.onnx` for each model, and every large constant of all of them once.

    Weights have the checkpoint's names (`.T` where stored transposed), other constants
    `<graph>/<name>`, so that equal
    names mean equal tensors: the runtime hands tensors to its sessions by name.
    """
    tensors: dict[str, ir.TensorProtocol] = {}
    for graph_name, model in models.items():
        for value in _large(model):
            tensor = value.const_value
            assert tensor is not None
            name = str(value.name)
            if "." not in name or tensors.get(name, tensor) is not tensor:
                value.name = name = f"{graph_name}/{name}"
            tensors[name] = tensor
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
    try:
        save_file(arrays, folder / WEIGHTS)
    except SafetensorError as error:  # its only word for a full disk
        raise PotexportError(
            f"{WEIGHTS} cannot be written ({error}); free "
            f"{sum(array.nbytes for array in arrays.values()):,} bytes or choose another --output"
        ) from error
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private
    stored = layout(folder / WEIGHTS)
    for graph_name, model in models.items():
        for value in _large(model):
            value.const_value = _pointer(value, stored[str(value.name)], folder)
        ir.save(model, folder / f"{graph_name}.onnx")


def layout(path: Path) -> dict[str, Stored]:
    """Offsets of the tensors of a safetensors file: 8 bytes of header length, a JSON header,
    data."""
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_length))
    begin = 8 + header_length
    ranges = {
        name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
    }
    return {name: Stored(begin + first, last - first) for name, (first, last) in ranges.items()}


def check(path: Path, spec: GraphSpec) -> None:
    """Read a graph back and compare it with its contract; RuntimeError, for it would be our
    mistake, says where it differs.

    Every tensor in it must have a constant shape, and no operator may compute one.
    """
    model = onnx.load(path, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for kind, found, wanted in (
        ("input", graph.input, spec.inputs),
        ("output", graph.output, spec.outputs),
    ):
        have = [
            (v.name, ELEMENT_TYPES.get(v.type.tensor_type.elem_type, "?"), _shape(v)) for v in found
        ]
        want = [(tensor.name, tensor.dtype, tensor.shape) for tensor in wanted]
        wrong = [f"{w} is {h}" for h, w in zip(have, want, strict=False) if h != w]
        if wrong or len(have) != len(want):
            raise RuntimeError(
                f"{path.name}: {len(have)} {kind}s for {len(want)}; {'; '.join(wrong[:3])}"
            )
    known = {
        value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)
    }
    for node in graph.node:
        if node.op_type in FORBIDDEN:
            raise RuntimeError(
                f"{path.name}: node {node.name} is a {node.op_type}, whose shapes are not constant"
            )
        open_ended = [
            name
            for name in node.output
            if name and not all(isinstance(d, int) for d in known.get(name, ("?",)))
        ]
        if open_ended:
            raise RuntimeError(
                f"{path.name}: {node.op_type} {node.name} makes {open_ended} of unknown shape"
            )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


def _large(model: ir.Model) -> list[ir.Value]:
    values = list(model.graph.initializers.values())
    return [
        value
        for value in values
        if value.const_value is not None and value.const_value.nbytes >= EXTERNAL_FROM
    ]


def _pointer(value: ir.Value, place: Stored, folder: Path) -> ir.ExternalTensor:
    tensor = value.const_value
    assert tensor is not None
    return ir.ExternalTensor(
        WEIGHTS,
        place.offset,
        place.length,
        tensor.dtype,
        shape=ir.Shape(tensor.numpy().shape),
        name=str(value.name),
        base_dir=folder,
    )
