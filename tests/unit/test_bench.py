"""What `bench` is made of: processes, statistics, yardsticks, and bytes counted from graphs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potexport.benching import accounting, yardsticks
from potexport.benching.figures import Spread
from potexport.benching.workers import Worker, WorkerError
from potexport.errors import PotexportError


class Thing:
    """Something to hold, with every way to fail."""

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError("below zero")
        self.number = number

    def more(self, count: int) -> int:
        self.number += count
        return self.number

    def threads(self) -> str:
        return os.environ["OMP_NUM_THREADS"]

    def refuse(self) -> None:
        raise PotexportError("no")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_keeps_what_it_holds_and_says_how_it_fails() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    with Worker(Thing, 1, threads=7) as worker:
        assert [worker.ask("more", 2), worker.ask("more", 3)] == [3, 6]
        assert worker.ask("threads") == "7"
        assert os.environ.get("OMP_NUM_THREADS") == before
        with pytest.raises(PotexportError, match=r"^no$"):
            worker.ask("refuse")
        with pytest.raises(WorkerError, match="TypeError"):
            worker.ask("more")
        assert worker.ask("more", 1) == 7  # it goes on
        with pytest.raises(WorkerError, match="died of SIGKILL; it may have had too little memory"):
            worker.ask("die")
        with pytest.raises(WorkerError, match="SIGKILL"):
            worker.ask("more", 1)
    with pytest.raises(WorkerError, match="ValueError: below zero"):
        Worker(Thing, -1, threads=1)


def test_quartiles_are_numpys() -> None:
    values = [5.0, 1.0, 4.0, 2.0]
    low, middle, high = np.percentile(values, [25, 50, 75])
    assert Spread.of(values) == Spread(middle, low, high, 4)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([]) is None


def test_the_machine_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks, "both_arrays", lambda: 1 << 20)
    found = yardsticks.Yardsticks(2)
    assert min(found.both()) > 0
    assert (found._to == found._from).all()  # each thread copied its part
    assert found.facts()["copied_bytes"] == 1 << 19


def test_bytes_and_operations_are_those_of_the_graph(tmp_path: Path) -> None:
    """Of a table that is only looked up, a row; of one that is the head too, all."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rows, wide, inner, tokens = 11, 6, 10, 4
    weights: dict[str, Any] = {
        "table": np.zeros((rows, wide), np.float32),
        "up": np.zeros((wide, inner), np.float16),
        "packed": np.zeros((wide, 1, 5), np.uint8),  # 10 inputs, 4 bits each
        "scales": np.zeros((wide, 1), np.float32),
        "nobody's": np.zeros((100, 100), np.float32),
    }

    def save(head: bool) -> Path:
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["x"]),
            helper.make_node("MatMul", ["x", "up"], ["y"]),
            helper.make_node(
                "MatMulNBits", ["y", "packed", "scales"], ["z"], domain="com.microsoft", K=10, N=6
            ),
        ]
        if head:  # of one position
            nodes += [
                helper.make_node("Gather", ["z", "last"], ["one"]),
                helper.make_node("Gemm", ["one", "table"], ["logits"], transB=1),
            ]
        shapes = {"x": [tokens, wide], "y": [tokens, inner], "z": [tokens, wide]}
        shapes |= {"logits": [1, rows]}
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]
        tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, "g", [], infos[-1:], tensors, value_info=infos[:-1])
        path = tmp_path / f"{head}.onnx"
        onnx.save(helper.make_model(graph), path)
        return path

    rest = 2 * wide * inner + 5 * wide + 4 * wide
    assert accounting.read_by_a_token(save(False)) == 4 * wide + rest
    assert accounting.read_by_a_token(save(True)) == 4 * rows * wide + rest
    layers = 2 * (wide * inner + inner * wide)
    assert accounting.products(save(False), tokens) == layers
    assert accounting.products(save(True), tokens) == layers + 2 * wide * rows // tokens
