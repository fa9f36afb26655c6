"""Help, listings, `inspect` and `verify`, on a tiny real bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from potexport import bundle as bundles
from potexport import parity
from potexport.runtime.session import Session
from tests.e2e.helpers import ROOT, Cli

HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "rich",
    "tokenizers",
}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom potexport.cli import cli\n"
        "try: cli.main(['build', '--help'])\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--catalyst-width" in done.stdout
    assert "potexport.cli" in done.stderr.split()
    assert not HEAVY & set(done.stderr.split())


def test_running_a_bundle_imports_no_toolchain(bundle: Path) -> None:
    code = (
        "import sys\nfrom potexport.cli import cli\n"
        f"try: cli.main(['run', {str(bundle)!r}, 'hi', '--max-new-tokens', '2'])\n"
        "except SystemExit as end: print('code', end.code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    words = done.stderr.split()
    assert words[words.index("code") + 1] == "0"
    assert not {"torch", "transformers", "onnx", "onnxscript", "safetensors"} & set(words)


@pytest.mark.parametrize(
    "command",
    ["build", "run", "inspect", "verify", "coverage", "push", "policies", "targets", None],
)
def test_every_command_has_help_and_json(cli: Cli, command: str | None) -> None:
    result = cli(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    assert command is None or "--json" in result.stdout


def test_without_arguments_it_shows_its_commands(cli: Cli) -> None:
    result = cli()
    assert result.exit_code == 2
    assert "inspect" in result.stderr


def test_inspect_tells_all(cli: Cli, bundle: Path) -> None:
    shown = cli("inspect", bundle).stdout
    for word in ("alpha=0.5", "mass.{0…1} float32[2,48]", "potexport.json", "torch", "total"):
        assert word in shown
    found = json.loads(cli("inspect", bundle, "--json").stdout)
    assert found["tools"]["potexport"] != "not installed"
    memory = found["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    pot = Session.open(bundle).backend.pot
    assert memory["pot"] == pot.bytes


def test_verify_passes_and_fails(
    cli: Cli, bundle: Path, model_folder: Path, tmp_path: Path, book: str
) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book, encoding="utf-8")
    options = ("--model", model_folder, "--compressions", 2, "--steps", 5)
    passed = cli("verify", bundle, *options, "--text", path, "--json")
    assert passed.exit_code == 0
    assert passed.stderr == ""
    assert json.loads(passed.stdout)["passed"] is True
    shown = cli("verify", bundle, *options)
    assert shown.exit_code == 0
    assert "✓" in shown.stdout


def test_verify_notices_a_graph_that_keeps_other_slots(
    cli: Cli, bundle: Path, model_folder: Path, tmp_path: Path
) -> None:
    """The manifest names another share of novel slots than the graph was built with."""
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    text = (other / "potexport.json").read_text(encoding="utf-8")
    assert '"alpha": 0.5' in text
    (other / "potexport.json").write_text(text.replace('"alpha": 0.5', '"alpha": 0.9'))
    asked = ("--model", model_folder, "--compressions", 2, "--steps", 5, "--json")
    result = cli("verify", other, *asked)
    assert result.exit_code == 1
    failed = [each["name"] for each in json.loads(result.stdout)["checks"] if not each["passed"]]
    assert failed == ["past the pot: kept slots that differ"]


def test_verify_fails_with_exit_code_1(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(folder: Path, model: str, **_: object) -> parity.Report:
        report = parity.Report(str(folder), model, "fp32")
        report.add("logits", float("nan"), 1e-4, "an oracle [of sorts]")
        return report

    monkeypatch.setattr(parity, "verify", failing)
    shown = cli("verify", bundle, "--model", "m")
    assert shown.exit_code == 1
    assert "✗" in shown.stdout
    assert "[of sorts]" in shown.stdout
    as_json = cli("verify", bundle, "--model", "m", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["passed"] is False


def test_policies_and_targets_are_listed(cli: Cli) -> None:
    policies = json.loads(cli("policies", "--json").stdout)
    assert policies["infinipot"]["needs"] == ["mass", "novelty"]
    assert policies["infinipot"]["settings"]["alpha"] == 0.5
    assert all(policy["summary"] for policy in policies.values())
    assert policies["snapkv"]["costs"]["passes"] == ["a pass of the last tokens, once more"]
    assert policies["infinipot"]["source"] == "arXiv 2410.01518"
    shown = cli("policies").stdout
    assert all(name.partition("-")[0] in shown for name in policies)
    listed = json.loads(cli("targets", "--json").stdout)
    assert {each["runtime"] for each in listed if each["name"] == "cpu"} == {
        "onnxruntime",
        "executorch",
    }
    assert "executed here" in cli("targets").stdout


def test_models_tell_what_was_proven_where(cli: Cli) -> None:
    found = json.loads(cli("models", "--json").stdout)
    both = {
        each["type"]
        for each in found["proven"]
        if each["onnxruntime"]["compressions"] >= 10 and each["executorch"]["compressions"] >= 10
    }
    assert len(both) >= 16
    assert {"llama", "gemma3_text", "mixtral", "falcon"} <= both
    shown = cli("models").stdout
    assert all(kind in shown for kind in both)
    assert "gpt2 has no rotary positions" in shown


def test_a_bug_of_ours_shows_its_traceback(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(bundles, "read", broken)
    with pytest.raises(RuntimeError, match="ours"):
        cli("inspect", bundle)
