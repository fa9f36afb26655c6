"""Weights as codes in blocks, against GGUF's own quantizer and ONNX Runtime's products."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from potexport import n_bit
from potexport.n_bit import BLOCK, Blocks

ROWS, DEPTH = 24, 4 * BLOCK
MATRICES = arrays.arrays(
    np.float32, (3, DEPTH), elements=st.floats(-8, 8, width=16, allow_subnormal=False)
)


def coded_before(kind: GGMLQuantizationType, seed: int = 0) -> n_bit.Array:
    """Weights as a GGUF file of this type gives them."""
    plain = np.random.default_rng(seed).standard_normal((ROWS, DEPTH)).astype(np.float32)
    made: n_bit.Array = quants.dequantize(quants.quantize(plain, kind), kind)
    return made


@pytest.mark.parametrize(
    ("kind", "bits", "within"),
    [
        (GGMLQuantizationType.Q8_0, 8, 1e-6),
        (GGMLQuantizationType.Q4_0, 4, 1e-6),
        (GGMLQuantizationType.Q4_1, 4, 0.1),  # steps: half a step, to 4 bits
    ],
)
def test_what_was_codes_is_not_rounded_again(
    kind: GGMLQuantizationType, bits: int, within: float
) -> None:
    weights = coded_before(kind)
    made = n_bit.eight(weights) if bits == 8 else n_bit.four(weights)
    assert (made.sums > 0) == (kind == GGMLQuantizationType.Q4_1)
    off = np.abs(n_bit.decoded(made, bits) - weights).reshape(ROWS, -1, BLOCK)
    steps = made.scales[:, : DEPTH // BLOCK, None]
    assert (off <= within * np.abs(steps)).all()


@given(MATRICES)
@settings(max_examples=60, deadline=None)
def test_no_number_is_off_by_more_than_rounding(matrix: n_bit.Array) -> None:
    blocks = matrix.reshape(3, -1, BLOCK)
    ends = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    off = np.abs(n_bit.decoded(n_bit.four(matrix), 4) - matrix).reshape(blocks.shape)
    # Half a step of the block, and half a 4-bit step of the largest that whole zero points leave.
    left = ends.max(axis=-1, keepdims=True) / 15 / 2 / 7 / 2
    assert (off <= (ends / 15 / 2 + left)[..., None] + 1e-5).all()
    off = np.abs(n_bit.decoded(n_bit.eight(matrix), 8) - matrix).reshape(blocks.shape)
    assert (off <= (np.abs(blocks).max(-1) / 127 / 2)[..., None] + 1e-5).all()
    codes, scales = n_bit.columns(matrix)
    assert (np.abs(codes.T * scales[:, None] - matrix) <= scales[:, None] / 2 + 1e-5).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_reads_the_codes_as_we_do(bits: int) -> None:
    weights = coded_before(GGMLQuantizationType.Q4_1)
    made = n_bit.eight(weights) if bits == 8 else n_bit.four(weights)
    x = np.random.default_rng(1).standard_normal((1, 5, DEPTH)).astype(np.float32)
    wanted = x @ n_bit.decoded(made, bits).T
    found = product(made, bits, x)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def product(made: Blocks, bits: int, x: n_bit.Array) -> n_bit.Array:
    """ONNX Runtime's, in float arithmetic."""
    if made.sums:
        x = np.concatenate([x, x @ n_bit.sums_of(DEPTH)], axis=-1)
    columns, count, _ = made.codes.shape
    constants = {"codes": made.codes, "scales": made.scales, "zeros": made.zeros}
    given = {name: each for name, each in constants.items() if each is not None}
    node = helper.make_node("MatMulNBits", ["x", *given], ["y"], domain="com.microsoft",
                            K=count * BLOCK, N=columns, bits=bits, block_size=BLOCK)  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x.shape[:-1], columns])],
        [numpy_helper.from_array(each, name) for name, each in given.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)
