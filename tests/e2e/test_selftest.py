"""The self-test of a device: it passes on a sound bundle, and sees each thing that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from potexport import bundle as bundles
from potexport.geometry import PotGeometry
from potexport.runtime import selftest
from potexport.runtime.backend import Array
from potexport.runtime.onnxruntime_backend import OnnxRuntimeBackend
from potexport.runtime.selftest import Run
from potexport.runtime.session import Session
from tests.e2e.helpers import ROOT


def test_it_runs_without_the_toolchain(bundle: Path) -> None:
    """As on a phone: a process that has none of the packages that a phone has not."""
    absent = ("torch", "transformers", "onnx", "safetensors", "click", "rich")
    program = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({absent!r}); "
        f"sys.argv = ['selftest', {str(bundle)!r}, '--json']; "
        "runpy.run_module('potexport.runtime.selftest', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=ROOT, check=True
    )
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["skipped"].startswith("npu: not tested: ")
    assert report["peak_memory"] > 10e6


def test_it_prints_for_a_person(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([str(bundle), "--backend", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["ok"] * 3
    assert shown[-1] == "passed"


def test_what_cannot_run_is_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main([str(bundle), "--backend", "npu"]) == 2
    assert selftest.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 2


def _not_finite(backend: OnnxRuntimeBackend) -> None:
    decode = backend.decode
    backend.decode = lambda token, novelty: decode(token, novelty) * np.nan  # type: ignore[method-assign]


def _one_slot_more(backend: OnnxRuntimeBackend) -> None:
    """The pot believes in one more token behind each chunk."""
    append = backend.pot.append

    def longer(keys: list[Array], values: list[Array], novelty: Array | float, count: int) -> None:
        append(keys, values, novelty, count)
        backend.pot.fill = min(backend.pot.fill + (count > 1), backend.pot.slots)

    backend.pot.append = longer  # type: ignore[method-assign]


def _edit_kept(backend: OnnxRuntimeBackend, edit: Callable[[Array], None]) -> None:
    compress = backend.compress

    def wrong(keep: int, *, reset: bool = True) -> list[Array]:
        kept = [each.copy() for each in compress(keep, reset=reset)]
        edit(kept[1])
        return kept

    backend.compress = wrong  # type: ignore[method-assign]


def _out_of_order(kept: Array) -> None:
    kept[0, [5, 6]] = kept[0, [6, 5]]


def _no_sink(kept: Array) -> None:
    kept[0, 0] = kept[0, 2] - 1


def _a_free_slot(kept: Array) -> None:
    kept[0, -1] = 4000


FAULTS: dict[str, tuple[Callable[[OnnxRuntimeBackend], None], str]] = {
    "not finite": (_not_finite, "finite"),
    "fill": (_one_slot_more, "fills"),
    "order": (lambda backend: _edit_kept(backend, _out_of_order), "ascend"),
    "sink": (lambda backend: _edit_kept(backend, _no_sink), "ascend"),
    "free": (lambda backend: _edit_kept(backend, _a_free_slot), "ascend"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_check(
    bundle: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, word = FAULTS[fault]

    def faulty(folder: str | Path, backend: str, *, check: bool) -> Session:
        session = Session.open(folder, check=check)
        assert isinstance(session.backend, OnnxRuntimeBackend)
        plant(session.backend)
        return session

    monkeypatch.setattr(selftest, "_open", faulty)
    report = selftest.selftest(bundle, backend="cpu")
    failed = [check.name for check in report.checks if not check.passed]
    assert len(failed) == 1
    assert word in failed[0]
    assert not report.passed


def test_two_processors_are_compared(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the CPU here, so they agree to the last slot; with one broken they do not."""

    def anything(folder: str | Path, backend: str, *, check: bool) -> Session:
        return Session.open(folder, check=check)

    monkeypatch.setattr(selftest, "_open", anything)
    report = selftest.selftest(bundle)
    assert report.passed
    assert [check.name for check in report.checks[6:]] == [
        "npu and cpu: logits agree",
        "npu and cpu: kept slots agree",
    ]
    assert report.checks[6].found.startswith("cosine 1.000000 at least; 100.0% of likeliest")
    assert report.checks[7].found.startswith("100.00% at the first compression, then 100.00%")
    assert list(report.speeds) == ["npu", "cpu"]

    def crooked(folder: str | Path, backend: str, *, check: bool) -> Session:
        session = anything(folder, backend, check=check)
        if backend == "npu":  # its pot is spoiled: other slots, other tokens
            prefill = session.backend.prefill

            def wrong(ids: Array, next_ids: Array, first_novelty: float) -> float:
                novelty = prefill(ids, next_ids, first_novelty)
                for array in (*session.backend.pot.keys, *session.backend.pot.values):
                    array *= -1.5
                return novelty

            session.backend.prefill = wrong  # type: ignore[method-assign]
        return session

    monkeypatch.setattr(selftest, "_open", crooked)
    failed = [check.name for check in selftest.selftest(bundle).checks if not check.passed]
    assert failed == [check.name for check in report.checks[6:]]


@pytest.mark.parametrize("read", [1, 7, 8, 9, 47, 48, 49, 200, 301])
def test_the_expected_fill_is_the_loops(bundle: Path, read: int) -> None:
    session = Session.open(bundle, threads=1)
    ids = np.arange(read, dtype=np.int32) % 300
    done = selftest.run(session, ids, "cpu")
    pot = bundles.read(bundle).pot
    assert selftest.expected(pot, read, selftest.NEW_TOKENS) == (done.fill, done.fill_after)


def test_by_default_it_reads_past_two_compressions(bundle: Path) -> None:
    pot = bundles.read(bundle).pot
    fills, _ = selftest.expected(pot, selftest.needed(pot), 0)
    assert len(fills) >= selftest.COMPRESSIONS
    large = PotGeometry(**{**pot.__dict__, "slots": 512, "chunk": 64, "keep": 448, "keep_max": 448})
    assert len(selftest.expected(large, selftest.needed(large), 0)[0]) >= selftest.COMPRESSIONS


def test_kept_slots_are_compared_head_by_head() -> None:
    def kept(*slots: int) -> list[Array]:
        return [np.array(slots, np.int32).reshape(1, 2, 2)]

    logits = [np.array([1.0, 2.0], np.float32)]
    one = Run("a", 1, 1, kept(0, 1, 2, 3), logits=logits)
    swapped = Run("b", 1, 1, kept(2, 3, 0, 1), logits=[np.array([2.0, 1.0], np.float32)])
    logits_agree, slots_agree = selftest.compare(one, swapped)
    assert (logits_agree.passed, slots_agree.passed) == (False, False)
    assert logits_agree.found == "cosine 0.800000 at least; 0.0% of likeliest tokens the same"
    assert slots_agree.found == "0.00% at the first compression"
    other_shape = Run("b", 1, 1, [np.zeros((1, 1, 4), np.int32)], logits=logits)
    assert [check.passed for check in selftest.compare(one, other_shape)] == [True, False]
