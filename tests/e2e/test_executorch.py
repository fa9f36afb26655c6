"""A bundle for ExecuTorch through the command line: the same words as for ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.helpers import Cli, assert_refused


@pytest.fixture(scope="module")
def program(
    cli: Cli, model_folder: Path, pot_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("executorch") / "tiny.bundle"
    options = ["--runtime", "executorch", "--policy", "infinipot", *pot_options]
    made = cli("build", model_folder, "-o", folder, *options)
    assert made.exit_code == 0, made.stderr
    assert "operators that XnnpackBackend takes" in made.stdout
    assert {path.name for path in folder.iterdir()} >= {"model.pte", "tokenizer.json"}
    assert not [*folder.glob("*.onnx"), *folder.glob("*.safetensors")]
    return folder


def test_both_runtimes_answer_alike(cli: Cli, bundle: Path, program: Path, book: str) -> None:
    answers = [
        json.loads(cli("run", each, "--json", "--raw", "--max-new-tokens", 12, stdin=book).stdout)
        for each in (bundle, program)
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["stats"]["compressions"] == answers[1]["stats"]["compressions"] >= 10


def test_it_is_verified_by_the_same_checks(cli: Cli, program: Path, model_folder: Path) -> None:
    report = json.loads(cli("verify", program, "--model", model_folder, "--json").stdout)
    assert report["passed"]
    assert len(report["checks"]) == 4


def test_another_models_program_is_told_apart(cli: Cli, program: Path, tmp_path: Path) -> None:
    from tests import tiny

    other = tiny.save(tmp_path / "m", "llama-tied", seed=1, vocab_size=307, num_hidden_layers=2)
    assert_refused(cli("verify", program, "--model", other), "its weights are not those")


def test_inspect_shows_the_methods(cli: Cli, program: Path) -> None:
    shown = cli("inspect", program).stdout
    assert "model.pte" in shown
    assert "in pieces" in shown
    document = json.loads(cli("inspect", program, "--json").stdout)
    assert document["program"]["delegate"] == "XnnpackBackend"
    assert document["memory"]["weights"] == (program / "model.pte").stat().st_size


def test_a_dry_run_names_the_program(cli: Cli, model_folder: Path) -> None:
    shown = cli("build", model_folder, "--dry-run", "--runtime", "executorch").stdout
    assert "model.pte" in shown
    assert ".onnx" not in shown


def test_what_is_for_onnx_runtime_alone_is_refused(
    cli: Cli, program: Path, model_folder: Path, tmp_path: Path
) -> None:
    assert_refused(cli("push", program), "an app", "--runtime onnxruntime")
    for chosen in ((), ("--soc", "sm8650")):
        assert_refused(cli("coverage", program, *chosen), "inspect shows")
    new = ("build", model_folder, "-o", tmp_path / "x", "--runtime", "executorch")
    assert_refused(cli(*new, "--precision", "a16w8"), "does not take a16w8", "fp32, w4")
    assert_refused(cli(*new, "--target", "windows-npu"), "no target 'windows-npu' for executorch")
    assert_refused(cli(*new, "--compress-on", "cpu"), "takes no --compress-on")
