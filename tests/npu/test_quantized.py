"""Quantized graphs on the HTP's emulator, against the same graphs on the CPU.

What they may differ by is fp16: the HTP computes in it between the quantized products, and the CPU
in fp32. So the limits are in steps of the logits' own 16-bit codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from potexport import bundle, htp
from potexport.recording import compare, record
from potexport.runtime.session import Session
from tests.npu.conftest import CATALYST, SOC, tokens
from tests.parity.test_quantized import build

READ, FORCED = 90, 20  # tokens: two compressions
WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}  # w4's blocks


def make(folder: Path, precision: str, policy: str) -> tuple[Path, str | None]:
    """A bundle of a tiny model, compiled, and the weight that its contexts take rows of."""
    # A CPU's own w4 has operators that the HTP refuses.
    own = {"soc": SOC.name, **WIDE} if precision == "w4" else {}
    build(folder, "llama-tied", precision, policy, **own)
    graphs = list(bundle.read(folder / "bundle").graphs)
    contexts = folder / "contexts"
    done = htp.compile_graphs(folder / "bundle", graphs, SOC, contexts, shared=False)
    return folder / "bundle", done[0].embedding


def step_of_logits(folder: Path) -> float:
    graph = onnx.load(folder / "decode.onnx", load_external_data=False).graph
    found = [t for t in graph.initializer if t.name.endswith("lm_head.weight.y.step")]
    return float(numpy_helper.to_array(found[0]))


# Largest and mean difference of a logit. Measured: a16w8 36 and 6 steps of its codes, for fp16 has
# 11 bits of their 16; w4 0.6% and 0.1% of the largest logit, as fp16 bundles have.
@pytest.mark.parametrize(("precision", "largest", "mean"), [("a16w8", 100, 15), ("w4", 100, 15)])
def test_the_emulator_computes_what_the_cpu_does(
    tmp_path: Path, precision: str, largest: float, mean: float
) -> None:
    """Past compressions, by a policy that keeps the same slots on both."""
    here, embedding = make(tmp_path, precision, "streaming")
    ids = tokens()[: READ + FORCED]
    files = htp.contexts(tmp_path / "contexts", list(bundle.read(here).graphs), SOC)
    mine = htp.read(
        here, files, ids[:READ], embedding=embedding, forced=ids[READ:], catalyst=CATALYST
    )
    cpu = record(Session.open(here), ids[:READ], forced=ids[READ:], catalyst=CATALYST)
    seen = compare(mine, cpu)
    assert seen.compressions >= 2
    assert seen.disagreements == 0
    assert seen.top1 >= 0.9  # two of 20 near ties, and no more
    assert seen.gap <= 0.005  # of the largest logit
    steps = step_of_logits(here) if precision == "a16w8" else np.abs(cpu.logits).max() / 10_000
    apart = np.abs(mine.logits - cpu.logits) / steps
    assert apart.max() <= largest
    assert apart.mean() <= mean
