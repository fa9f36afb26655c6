"""The arithmetic of quantization: ranges, scales, codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from potexport import quantize, quantize_blocks
from potexport.calibrate import Product, Ranges, Seen, pair_norm
from potexport.graphs.rope import turn_back
from potexport.quantize import CODES, HEADROOM, MIDDLE, Scale

Arrays = dict[str, np.ndarray[Any, Any]]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(-7.0, 7.0), min_size=1, max_size=20),
)
def test_no_number_of_turns_clips_a_key(seed: int, angles: list[float]) -> None:
    """Codes through any rotations, rounded after each, stay inside the range; half of the headroom
    would do for hundreds."""
    key = np.random.default_rng(seed).standard_normal((1, 1, 10, 7)) * 3
    step = Scale.of("step", pair_norm(key)).step
    numbers = torch.from_numpy(np.rint(key[0, 0] / step).T)
    for angle in angles:
        by = [torch.full((7, 5), f(angle), dtype=torch.float64) for f in (np.cos, np.sin)]
        numbers = turn_back(numbers, torch.cat(by, dim=-1)).round()
        assert numbers.abs().max() <= CODES / 2 / HEADROOM + len(angles)


def test_the_largest_coordinate_is_no_bound() -> None:
    """What the scale must not come from: a turn by 45 degrees makes it larger by a half."""
    key = torch.ones(1, 2)
    half = torch.full((1, 2), 0.5**0.5)
    assert turn_back(key, half).abs().max() > 1.4
    assert pair_norm(key.reshape(1, 1, 2, 1).numpy()) >= 1.4


def test_the_arithmetic_is_that_of_onnx_runtimes_quantizer(tmp_path: Path) -> None:
    """One product through `onnxruntime.quantization` for QNN, and through ours: the same codes,
    the same scales, the same operators."""
    chance = np.random.default_rng(3)
    weight = chance.standard_normal((12, 8)).astype(np.float32)
    x = chance.standard_normal((1, 5, 12)).astype(np.float32)
    model = product(weight)
    theirs = by_onnx_runtime(model, x, tmp_path)
    seen = Product(Seen(torch.zeros(12), torch.zeros(12)), Seen(torch.zeros(8), torch.zeros(8)))
    seen.x.add(torch.from_numpy(x) / HEADROOM)  # theirs leaves no room
    seen.y.add(torch.from_numpy(x @ weight) / HEADROOM)
    ours = ir.from_proto(model)
    quantize.a16w8({"decode": ours}, Ranges({"p.weight": seen}))
    mine = ir.to_proto(ours)
    kinds = sorted(node.op_type for node in mine.graph.node)
    # The graph's own input and output stay float here; theirs become codes and back as well.
    assert kinds == sorted(node.op_type for node in theirs.graph.node)
    a, b = constants(mine), constants(theirs)
    assert np.array_equal(a["p.weight.T.int8"], b["p.weight.T_quantized"])
    assert np.allclose(a["p.weight.T.steps"], b["p.weight.T_scale"], rtol=1e-6)
    assert np.allclose(a["x.step"], b["x_scale"], rtol=1e-6)
    assert np.allclose(a["p.weight.T.y.step"], b["y_scale"], rtol=1e-6)
    assert a["uint16.middle"] == b["x_zero_point"] == MIDDLE


def product(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    rows, columns = weight.shape
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "p.weight.T"], ["y"], name="product")],
        "decode",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, columns])],
        [numpy_helper.from_array(weight, "p.weight.T")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def by_onnx_runtime(
    model: onnx.ModelProto, x: np.ndarray[Any, Any], folder: Path
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantType
    from onnxruntime.quantization import quantize as run
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": x}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    config = get_qnn_qdq_config(
        model,
        Once(),
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        activation_symmetric=True,
        init_overrides={
            "p.weight.T": [{"quant_type": QuantType.QInt8, "axis": 1, "symmetric": True}]
        },
    )
    run(model, str(folder / "theirs.onnx"), config)
    return onnx.load(folder / "theirs.onnx")


def constants(model: onnx.ModelProto) -> Arrays:
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def test_a_product_too_coarse_for_16_bits_stays_float() -> None:
    """One channel of one token a million times as large as the rest."""
    calm, wild = torch.ones(100, 4), torch.ones(100, 4)
    wild[0, 0] = 1e6
    seen = [Seen(torch.zeros(4), torch.zeros(4)) for _ in range(2)]
    seen[0].add(calm)
    seen[1].add(wild)
    assert not quantize.coarse(Product(seen[0], seen[0]))
    assert quantize.coarse(Product(seen[0], seen[1]))
    assert quantize.coarse(Product(seen[1], seen[0]))


def test_fp16_weights_are_packed_too() -> None:
    """ONNX Runtime's kernel gives zeros for fp16 weights."""
    matrix = np.random.default_rng(0).standard_normal((64, 8))
    codes, scales = quantize_blocks.n_bits(matrix.astype(np.float16), 4)
    assert codes.shape == (8, 2, 16)
    assert scales.shape == (8, 2)
    assert (scales != 0).all()
