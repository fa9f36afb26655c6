"""Sessions over shared, once-packed weights: same results, less memory, refusals not crashes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from potexport.errors import PotexportError
from potexport.runtime.ort_capi import Array, Binding, CSession, OrtCError, SharedSessions

LAYERS, ROWS, D = 6, 50, 768  # six square weights of 2.25 MB
WIDTHS = (1, 4)
SHAPES = {"table": (ROWS, D), **{f"w{layer}": (D, D) for layer in range(LAYERS)}}
PACKED_MB = LAYERS * D * D * 4 / 1e6


def graph(width: int) -> onnx.ModelProto:
    """ids -> rows of a table -> a chain of MatMuls, weights in weights.bin, in SHAPES' order."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x0"])]
    for layer in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"x{layer + 1}"]))
    nodes.append(helper.make_node("Add", [f"x{LAYERS}", "bias"], ["y"]))
    nodes.append(helper.make_node("Cast", ["y"], ["half"], to=TensorProto.FLOAT16))
    nodes.append(helper.make_node("Add", ["step", "step"], ["twice"]))
    weights, offset = [], 0
    for name, shape in SHAPES.items():
        weight = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
        weight.data_location = TensorProto.EXTERNAL
        length = 4 * shape[0] * shape[1]
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        offset += length
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT32, [width]),
        helper.make_tensor_value_info("bias", TensorProto.FLOAT, [D]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [width, D]),
        helper.make_tensor_value_info("half", TensorProto.FLOAT16, [width, D]),
        helper.make_tensor_value_info("twice", TensorProto.INT64, [1]),
    ]
    body = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ort_capi")
    rng = np.random.default_rng(0)
    with (place / "weights.bin").open("wb") as file:
        for shape in SHAPES.values():
            file.write((rng.standard_normal(shape) / np.sqrt(D)).astype(np.float32).tobytes())
    for width in WIDTHS:
        (place / f"{width}.onnx").write_bytes(graph(width).SerializeToString())
    return place


def mapped(folder: Path, mode: str = "r") -> dict[str, Array]:
    file = np.memmap(folder / "weights.bin", dtype=np.float32, mode=mode)  # type: ignore[call-overload]
    views, at = {}, 0
    for name, (rows, columns) in SHAPES.items():
        views[name] = file[at : at + rows * columns].reshape(rows, columns)
        at += rows * columns
    return views


@pytest.fixture
def shared(folder: Path) -> Iterator[SharedSessions]:
    with closing(SharedSessions(threads=1, weights=mapped(folder))) as sessions:
        yield sessions


def feeds(width: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, ROWS, width).astype(np.int32),
        "bias": rng.standard_normal(D).astype(np.float32),
        "step": np.array([seed + 3], np.int64),
    }


def bound(session: CSession, inputs: dict[str, Array]) -> tuple[Binding, dict[str, Array]]:
    binding = session.binding()
    for name, array in inputs.items():
        binding.bind_input(name, array)
    outputs = {name: np.zeros(spec.shape, spec.dtype) for name, spec in session.outputs.items()}
    for name, array in outputs.items():
        binding.bind_output(name, array)
    return binding, outputs


def expected(
    folder: Path, width: int, inputs: dict[str, Array]
) -> dict[str, npt.NDArray[np.float32]]:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(folder / f"{width}.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_results_are_those_of_a_plain_session(folder: Path, shared: SharedSessions) -> None:
    for width in WIDTHS:
        inputs = feeds(width)
        session = shared.load(folder / f"{width}.onnx")
        assert session.inputs["ids"] == ("int32", (width,))
        assert list(session.outputs) == ["y", "half", "twice"]
        binding, outputs = bound(session, inputs)
        binding.run()
        for name, wanted in expected(folder, width, inputs).items():
            assert outputs[name].dtype == wanted.dtype
            # Same kernels, same packing, one thread or more: equal to the bit when measured.
            np.testing.assert_allclose(outputs[name], wanted, rtol=1e-5, atol=1e-6)


def test_the_given_weights_count_not_the_file(folder: Path) -> None:
    """The sibling of the test above that must differ.

    Copy-on-write pages are where dropping what was read would lose data: the zeros must stay.
    """
    weights = mapped(folder, mode="c")
    weights["table"][:] = 0
    with closing(SharedSessions(threads=1, weights=weights)) as sessions:
        binding, outputs = bound(sessions.load(folder / "1.onnx"), feeds(1))
        binding.run()
        np.testing.assert_array_equal(outputs["y"][0], feeds(1)["bias"])


def test_a_binding_sees_new_contents_and_no_other_binding(
    folder: Path, shared: SharedSessions
) -> None:
    session = shared.load(folder / "4.onnx")
    first_inputs, second_inputs = feeds(4, seed=1), feeds(4, seed=2)
    first, first_outputs = bound(session, first_inputs)
    second, second_outputs = bound(session, second_inputs)
    first.run()
    second.run()
    assert first_outputs["twice"] == 8
    assert second_outputs["twice"] == 10
    first_inputs["step"][0] = 50  # in place: nothing is bound anew
    before = second_outputs["y"].copy()
    first.run()
    assert first_outputs["twice"] == 100
    np.testing.assert_array_equal(second_outputs["y"], before)
    first.bind_input("step", np.array([7], np.int64))  # held by the binding alone
    gc.collect()
    first.run()
    assert first_outputs["twice"] == 14


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("ids", np.zeros(3, np.int32), r"'ids'.*\(3,\).*\(4,\)"),
        ("ids", np.zeros(4, np.int64), "int64.*int32"),
        ("ids", np.zeros(8, np.int32)[::2], "C-contiguous"),
        ("ids", np.zeros(4, ">i4"), "int32 array must be|>i4"),
        ("tokens", np.zeros(4, np.int32), "'tokens': the graph has ids, bias, step"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, shared: SharedSessions, name: str, array: Array, reason: str
) -> None:
    binding = shared.load(folder / "4.onnx").binding()
    with pytest.raises(OrtCError, match=reason):
        binding.bind_input(name, array)


def test_a_read_only_output_is_refused(folder: Path, shared: SharedSessions) -> None:
    binding = shared.load(folder / "1.onnx").binding()
    with pytest.raises(OrtCError, match="read-only"):
        binding.bind_output("y", np.broadcast_to(np.float32(0), (1, D)))


def test_what_onnxruntime_refuses_is_an_error_with_its_message(
    folder: Path, shared: SharedSessions, tmp_path: Path
) -> None:
    with pytest.raises(OrtCError, match=r"missing\.onnx"):
        shared.load(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(OrtCError, match=r"broken\.onnx"):
        shared.load(tmp_path / "broken.onnx")
    with pytest.raises(OrtCError, match="no weight 'w99'"):
        shared.load(folder / "1.onnx", names=["w99"])
    binding = shared.load(folder / "1.onnx").binding()
    with pytest.raises(PotexportError):  # inputs are missing
        binding.run()


def test_closing_closes_what_depends_on_it(folder: Path) -> None:
    sessions = SharedSessions(threads=1, weights=mapped(folder))
    session = sessions.load(folder / "1.onnx")
    binding, _ = bound(session, feeds(1))
    other, outputs = bound(session, feeds(1))
    binding.close()
    other.run()
    sessions.close()
    sessions.close()
    for use in (binding.run, other.run, session.binding, lambda: sessions.load("1.onnx")):
        with pytest.raises(OrtCError, match="closed"):
            use()
    assert outputs["twice"] == 6


MEMORY = """
import os, sys
from pathlib import Path
sys.path[:0] = os.environ["TEST_PATH"].split(os.pathsep)
from test_ort_capi import bound, feeds, mapped, SharedSessions
assert "onnxruntime" not in sys.modules

def anon():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

def resident():  # of the weights file
    blocks, rss, inside = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in blocks:
        inside = "weights.bin" in line if "-" in line.split()[0] else inside
        rss += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
    return rss / 1e3

folder, kept, at = Path(sys.argv[1]), [], anon()
one, other = (SharedSessions(threads=1, weights=mapped(folder)) for _ in range(2))
for shared, width in ((one, 1), (one, 4), (other, 4)):
    kept.append(bound(shared.load(folder / f"{width}.onnx"), feeds(width))[0])
    kept[-1].run()
    print(anon() - at)
    at = anon()
print(resident())
"""  # nothing is closed: what is left to the interpreter's exit must not crash it either


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sessions_pack_once_and_give_the_file_back(folder: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)],
        # glibc raises the threshold as it goes and then keeps what was freed: noise of 7 MB here.
        env={**os.environ, "TEST_PATH": path, "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, apart, of_file = map(float, done.stdout.split())
    assert first > 0.9 * PACKED_MB
    assert second < 0.2 * PACKED_MB, "the second session packed the weights again"
    assert apart > 0.9 * PACKED_MB, "the measure does not see packing: this must grow"
    assert of_file < 0.1 * PACKED_MB
