"""The rewrites for the HTP change no result: the same graphs, before and after, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from potexport.lower_htp import lower

WIDTH = 12


def graph(nodes: list[Any], dtype: int, **constants: np.ndarray[Any, Any]) -> bytes:
    """x (1, 5, WIDTH), ids (1, 5, 1) int64 -> y, as an ONNX model."""
    made = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", dtype, [1, 5, WIDTH]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 5, 1]),
        ],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    content: bytes = shape_inference.infer_shapes(model, data_prop=True).SerializeToString()
    return content


def both(content: bytes, x: np.ndarray[Any, Any]) -> tuple[Any, Any, dict[str, int]]:
    """Results before and after, and what fired."""
    ids = np.array([0, 3, 11, 7, 7]).reshape(1, 5, 1)
    model = ir.from_proto(onnx.load_from_string(content))
    fired = lower(model).fired
    results = [
        onnxruntime.InferenceSession(each).run(None, {"x": x, "ids": ids})[0]
        for each in (content, ir.to_proto(model).SerializeToString())
    ]
    return results[0], results[1], fired


def norm(dtype: Any, *, cast: bool, weight: str | None) -> bytes:
    """An RMS norm as PyTorch's exporter writes it: in fp32 between casts, with a weight before or
    behind the cast back, or with none."""
    node, element = helper.make_node, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inner = np.float32 if cast else dtype
    x = "x32" if cast else "x"
    nodes = [node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT)] if cast else []
    nodes += [
        node("Pow", [x, "two"], ["square"]),
        node("ReduceMean", ["square", "last"], ["mean"]),
        node("Add", ["mean", "epsilon"], ["moved"]),
        node("Sqrt", ["moved"], ["root"]),
        node("Reciprocal", ["root"], ["inverse"]),
        node("Mul", [x, "inverse"], ["n0"]),
    ]
    last = "n0"
    scale = {}
    if weight == "before":
        nodes.append(node("Mul", [last, "w"], ["n1"]))
        last, scale = "n1", {"w": np.linspace(0.5, 2, WIDTH).astype(inner)}
    if cast:
        nodes.append(node("Cast", [last], ["n2"], to=element))
        last = "n2"
    if weight == "behind":
        nodes.append(node("Mul", ["w", last], ["n3"]))
        last, scale = "n3", {"w": np.linspace(0.5, 2, WIDTH).astype(dtype)}
    nodes.append(node("Neg", [last], ["y"]))
    constants = {"two": np.array(2, inner), "epsilon": np.array(1e-5, inner)}
    return graph(nodes, element, last=np.array([-1]), **constants, **scale)


@pytest.mark.parametrize("weight", [None, "before", "behind"])
@pytest.mark.parametrize(("dtype", "cast"), [("float32", False), ("float16", True)])
def test_rms_norms_are_fused_and_equal(dtype: str, cast: bool, weight: str | None) -> None:
    x = np.random.default_rng(0).standard_normal((1, 5, WIDTH)).astype(dtype)
    before, after, fired = both(norm(np.dtype(dtype), cast=cast, weight=weight), x)
    assert fired["RMS norms fused"] == 1
    assert np.abs(before - after).max() <= (2e-6 if dtype == "float32" else 2e-3)


def test_what_only_looks_like_an_rms_norm_stays() -> None:
    """The mean over another axis."""
    content = norm(np.dtype("float32"), cast=False, weight=None)
    wrong = content.replace(
        numpy_helper.from_array(np.array([-1]), "last").SerializeToString(),
        numpy_helper.from_array(np.array([-2]), "last").SerializeToString(),
    )
    assert wrong != content
    x = np.ones((1, 5, WIDTH), np.float32)
    before, after, fired = both(wrong, x)
    assert fired["RMS norms fused"] == 0
    assert np.array_equal(before, after)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_log_softmax_in_blocks_is_equal(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potexport.lower_htp.LARGEST_BLOCK", 5)  # blocks of four
    nodes = [
        helper.make_node("LogSoftmax", ["x"], ["log"], axis=-1),
        helper.make_node("GatherElements", ["log", "ids"], ["y"], axis=-1),
    ]
    x = (np.random.default_rng(0).standard_normal((1, 5, WIDTH)) * scale).astype(np.float32)
    before, after, fired = both(graph(nodes, TensorProto.FLOAT), x)
    assert fired["log-softmaxes in blocks"] == 1
    assert np.allclose(before, after, rtol=1e-6, atol=1e-6)
