"""Where layers begin and end in a graph, found by how values flow; and what became of its nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from potexport import taps
from potexport.htp_taps import became

LAYERS, WIDTH = 3, 4
HALF = TensorProto.FLOAT16


def decoder(
    *, parallel: bool = False, head: bool = True, names: str = "model.layers"
) -> tuple[ir.Model, list[str]]:
    """A decoder of LAYERS toy layers, and the names of the residuals behind them.

    A layer is one product for attention, whose input makes the keys too, and one for the rest: one
    after the other, or side by side (`parallel`). Without a head the graph ends with the last keys.
    """
    node: Any = helper.make_node
    nodes = [node("Gather", ["embed", "input_ids"], ["h"]), node("Neg", ["h"], ["r"])]
    weights = {"embed": np.eye(9, WIDTH)}
    residual, behind = "r", []
    for n in range(LAYERS):
        for part in ("k_proj", "o_proj", "down_proj"):
            weights[f"{names}.{n}.{part}.weight"] = np.eye(WIDTH) * (n + 1)
        attention, rest, middle, end = (f"{kind}{n}" for kind in ("a", "m", "mid", "end"))
        nodes += [
            node("Exp", [residual], [f"norm{n}"]),
            node("MatMul", [f"norm{n}", f"{names}.{n}.k_proj.weight"], [f"present.{n}.key"]),
            node("Tanh", [f"present.{n}.key"], [f"t{n}"]),
            node("MatMul", [f"t{n}", f"{names}.{n}.o_proj.weight"], [attention]),
            node("Add", [residual, attention], [middle]),
            node(
                "MatMul",
                [residual if parallel else middle, f"{names}.{n}.down_proj.weight"],
                [rest],
            ),
            node("Add", [middle, rest], [end]),
        ]
        residual = end
        behind.append(end)
    outputs = [f"present.{n}.key" for n in range(LAYERS)]
    if head:
        nodes += [node("Sigmoid", [residual], ["p"]), node("Mul", ["p", residual], ["logits"])]
        outputs.append("logits")
    else:
        del nodes[-5:]
        behind[-1] = outputs[-1]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 2])],
        [helper.make_tensor_value_info(name, HALF, [1, 2, WIDTH]) for name in outputs],
        [numpy_helper.from_array(w.astype(np.float16), name) for name, w in weights.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(shape_inference.infer_shapes(proto)), behind


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_the_residuals_behind_each_layer(parallel: bool, head: bool) -> None:
    model, behind = decoder(parallel=parallel, head=head)
    flow = taps.Flow(model.graph)
    assert [value.name for value in flow.layers()] == behind
    assert flow.embedded is not None
    assert flow.embedded.name == "h"


def test_no_residual_that_all_goes_through_leaves_the_keys() -> None:
    """A value read again by all layers bypasses each of them."""
    model, _ = decoder()
    last = model.graph[-1]
    last.replace_input_with(1, model.graph[0].outputs[0])
    flow = taps.Flow(model.graph)
    assert [value.name for value in flow.layers()] == [f"present.{n}.key" for n in range(LAYERS)]


def test_inside_a_layer_values_are_called_by_their_modules() -> None:
    model, _ = decoder(names="transformer.blocks")
    found = [(each.name, each.part, each.operator) for each in taps.Flow(model.graph).inside(1)]
    assert found == [
        ("norm1", "to present.1.key", "Exp"),
        ("present.1.key", "present.1.key", "MatMul"),
        ("t1", "to o_proj", "Tanh"),
        ("a1", "o_proj", "MatMul"),
        ("mid1", "residual", "Add"),
        ("m1", "down_proj", "MatMul"),
        ("end1", "residual", "Add"),
    ]


def test_a_tapped_graph_in_fp32_gives_the_values_of_the_one_in_fp16() -> None:
    results = []
    for whole in (False, True):
        model, behind = decoder()
        if whole:
            taps.single(model)
        assert taps.tap(model, [*behind, "not there", "logits", *behind]) == [*behind, "logits"]
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        assert len(session.get_outputs()) == 2 * LAYERS + 1
        assert {each.type for each in session.get_outputs()} == {
            "tensor(float)" if whole else "tensor(float16)"
        }
        results.append(session.run(behind, {"input_ids": np.array([[1, 3]])}))
    for half, single in zip(*results, strict=True):
        np.testing.assert_allclose(half, single, rtol=5e-3)


def test_nodes_are_matched_by_name_by_output_and_by_how_the_name_begins() -> None:
    nodes = [
        ("node_linear", "MatMul", ["linear"]),
        ("node_linear_1", "MatMul", ["linear_1"]),
        ("node_pool", "MaxPool", ["pool"]),
        ("node_cast", "Cast", ["cast"]),
        ("node_erf", "Erf", ["erf"]),
    ]
    dumped = {
        "node_linear": {"type": "FullyConnected", "output_names": ["linear_reshape"]},
        "linearReshape": {"type": "Reshape", "output_names": ["linear"]},
        "node_linear_1": {"type": "MatMul", "output_names": ["linear_1"]},
        "node_pool_token_1PoolMax2d": {"type": "PoolMax2d", "output_names": ["pool_after"]},
        "Transpose_token_4": {"type": "Transpose", "output_names": ["Transpose_token_4_out0"]},
    }
    found = became(nodes, dumped, {"node_erf"})
    assert found["became"] == {
        "MatMul": {"FullyConnected + Reshape": 1, "MatMul": 1},
        "MaxPool": {"PoolMax2d": 1},
        "Cast": {"": 1},
    }
    assert found["added"] == {"Transpose": 1}
