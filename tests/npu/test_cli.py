"""`--target android-npu` from the command line: build, verify, run elsewhere, and the refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from potexport import bundle, htp, npu
from potexport.errors import PotexportError
from potexport.runtime import provider
from potexport.runtime.session import Session
from potexport.targets import android_npu
from tests.e2e.helpers import assert_refused
from tests.npu.conftest import Case
from tests.npu.test_htp import with_an_erf

Make = Callable[[str, str], Case]


def potexport(*arguments: object) -> Result:
    from potexport.cli import cli

    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_bundle_holds_contexts_that_share_their_weights(case: Make) -> None:
    here = case("llama-tied", "infinipot")
    (made,) = here.manifest.npu
    assert (made.soc, made.htp_arch, made.soc_model) == ("sm8650", 75, 57)
    assert list(made.contexts) == list(here.manifest.graphs)
    assert made.gate == 1.0
    assert len(list(here.bundle.glob("*_qnn.bin"))) == 1
    total = sum(context.bytes for context in made.contexts.values())
    apart = sum(path.stat().st_size for path in here.contexts["prefill"].parent.iterdir())
    assert total < 0.8 * apart
    shown = potexport("inspect", here.bundle)
    assert "Snapdragon 8 Gen 3" in shown.stdout
    assert not [path for path in here.bundle.iterdir() if path.name.startswith(".")]


def test_verify_runs_the_emulator(case: Make) -> None:
    here = case("qwen2", "infinipot")
    options = ("--compressions", 2, "--steps", 12, "--json")
    result = potexport("verify", here.bundle, "--model", here.model, *options)
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report
    names = [check["name"] for check in report["checks"]]
    assert names[:2] == ["context that fits: tokens that differ", "context that fits: logits"]
    wanted = {"npu prefill: new rows", "npu observe: mass", "npu compress: kept"}
    wanted |= {"npu loop: kept slots that differ", "npu answer: tokens below the reference's best"}
    assert wanted <= set(names)
    assert "answer" in report["notes"][0]


def test_the_same_bundle_runs_on_a_cpu(case: Make) -> None:
    here = case("qwen2", "infinipot")
    answer = potexport("run", here.bundle, "the fox", "--max-new-tokens", 4, "--json")
    assert len(json.loads(answer.stdout)["token_ids"]) > 0
    refused = potexport("run", here.bundle, "the fox", "--backend", "npu")
    assert_refused(refused, "contexts that share their weights run on a device only")


def test_compressions_can_stay_on_the_cpu(case: Make, tmp_path: Path) -> None:
    """Asked for, or because the gate does not pass; the emulator then runs three graphs."""
    here = case("qwen2", "infinipot")
    (made,) = npu.compile_into(
        Path(shutil.copytree(here.bundle, tmp_path / "b")),
        here.manifest.layout,
        android_npu.TARGET.chips(["sm8650"]),
        compress_on="cpu",
    )
    assert (made.compress_on, made.gate) == ("cpu", None)
    assert list(made.contexts) == ["prefill", "decode", "observe"]


@pytest.mark.parametrize(
    ("gate", "asked", "where"),
    [
        (npu.Gate(0.5, 0.0), None, "cpu"),
        (npu.Gate(1.0, 0.5), None, "cpu"),
        (npu.Gate(0.5, 0.0), "npu", "npu"),
    ],
)
def test_the_gate_decides_unless_somebody_does(
    case: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gate: npu.Gate,
    asked: str | None,
    where: str,
) -> None:
    here = case("qwen2", "infinipot")
    monkeypatch.setattr(npu, "try_compress", lambda *_: gate)
    compiled: list[list[str]] = []

    def compile_graphs(_: Path, graphs: list[str], *__: object, **___: object) -> list[object]:
        compiled.append(graphs)
        return []

    monkeypatch.setattr(htp, "compile_graphs", compile_graphs)
    npu.compile_into(
        tmp_path, here.manifest.layout, android_npu.TARGET.chips(["sm8650"]), compress_on=asked
    )
    assert ("compress" in compiled[0]) == (where == "npu")


def test_a_refused_graph_leaves_the_old_bundle_as_it_was(
    case: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = case("llama", "infinipot")
    old = Path(shutil.copytree(here.bundle, tmp_path / "old.bundle"))
    before = {path.name: bundle.sha256(path) for path in old.iterdir()}
    real = npu.compile_into

    def plant(folder: Path, *args: object, **kwargs: object) -> object:
        return real(with_an_erf(folder), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(npu, "compile_into", plant)
    options = ("--target", "android-npu", "--soc", "sm8650", "--pot", 48, "--chunk", 8)
    result = potexport("build", here.model, "-o", old, *options, "--force")
    assert result.exit_code == 2
    assert "the HTP refuses 1 nodes of graph decode: Erf culprit" in result.stderr
    assert {path.name: bundle.sha256(path) for path in old.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.bundle"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "android-npu"), ("give --soc", "sm8550", "Snapdragon 8 Elite Gen 5")),
        (("--target", "android-npu", "--soc", "sm1"), ("no 'sm1'", "choose: sm8550")),
        (("--target", "cpu", "--soc", "sm8650"), ("takes no --soc",)),
        (("--target", "cpu", "--compress-on", "npu"), ("takes no --compress-on",)),
        (("--target", "android-npu", "--soc", "sm8650", "--opset", 18), ("--opset", "23 to 23")),
        (("--target", "android-npu", "--soc", "sm8650", "--precision", "fp32"), ("fp16",)),
    ],
)
def test_mistakes_are_one_line(
    case: Make, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    here = case("llama", "infinipot")
    assert_refused(potexport("build", here.model, "-o", tmp_path / "b", *options), *words)


def test_without_the_compiler_the_line_names_the_extra(
    case: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, find = case("llama", "infinipot"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxruntime_qnn" else find(name, *rest),
    )
    options = ("--target", "android-npu", "--soc", "sm8650")
    result = potexport("build", here.model, "-o", tmp_path / "b", *options)
    assert_refused(result, "pip install 'potexport[qnn]'")
    assert android_npu.TARGET.state == "not here: needs potexport[qnn]"


def test_contexts_are_chosen_by_the_chip(case: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = case("llama", "infinipot").manifest
    assert provider.choose(manifest, "SM8650") == manifest.npu[0]
    assert provider.choose(manifest, None) == manifest.npu[0]  # the only one
    assert provider.choose(manifest, "sm8550") is None
    monkeypatch.setattr(provider, "device_soc", lambda: "SM8750")
    assert provider.choose(manifest, None) is None
    with pytest.raises(PotexportError, match="compiled for sm8650, not for SM8750"):
        Session.open(case("llama", "infinipot").bundle, backend="npu")
