"""`potexport build`, on a tiny real model: what it makes, refuses and leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potexport import bundle as bundles
from potexport import folders, route_onnx
from tests.e2e.helpers import Cli, Start, assert_refused


def test_dry_run_prints_all_and_writes_nothing(
    cli: Cli, model_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "not yet" / "b"
    result = cli("build", model_folder, "-o", output, "--dry-run", "--pot", 48, "--chunk", 8)
    assert result.exit_code == 0
    assert "in   past_key_values.{0…1}.key float32[1,2,10,48]" in result.stdout
    assert "out  logits float32[1,1,307]" in result.stdout
    for word in ("keep max", "weights.safetensors", "buffers of compress", "total", "blend"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_json_is_what_the_build_makes(
    cli: Cli, model_folder: Path, bundle: Path, pot_options: list[str]
) -> None:
    options = [*pot_options, "--policy", "infinipot", "--dry-run", "--json"]
    planned = json.loads(cli("build", model_folder, *options).stdout)
    built = json.loads(cli("inspect", bundle, "--json").stdout)
    for part in ("model", "pot", "precision", "target"):
        assert planned[part] == built[part], part
    for name, graph in planned["graphs"].items():
        assert graph.items() <= built["graphs"][name].items(), name
    weights = planned["memory"].pop("weights")
    # Where tokens may stand: cos and sin of the model, and of what turns kept keys back.
    tables = 3 * 4 * built["pot"]["positions"] * built["model"]["head_size"]
    assert weights <= built["memory"].pop("weights") <= 1.05 * weights + tables
    del planned["memory"]["total"], built["memory"]["total"]
    assert planned["memory"] == built["memory"]


def test_build_tells_its_stages_and_what_to_type_next(
    cli: Cli, model_folder: Path, tmp_path: Path, pot_options: list[str]
) -> None:
    output = tmp_path / "a [b] c.bundle"
    options = [*pot_options, "--policy", "streaming", "--opset", 18]
    result = cli("build", model_folder, "-o", output, *options)
    assert result.exit_code == 0, result.stderr
    stages = [line.rpartition(": ")[0] for line in result.stderr.splitlines()]
    assert stages[0] == "read the configuration"
    assert stages[-1] == "digests and manifest"
    assert f"potexport run '{output}'" in result.stdout
    assert cli("run", output, "hi", "--max-new-tokens", 3).exit_code == 0

    kept = output / "potexport.json"
    before = kept.read_bytes()
    refused = cli("build", model_folder, "-o", output, *options)
    assert_refused(refused, "exists", "--force")
    assert kept.read_bytes() == before
    options = [*pot_options, "--policy", "infinipot", "--force", "--json"]
    forced = cli("build", model_folder, "-o", output, *options)
    assert forced.stderr == ""
    made = json.loads(forced.stdout)
    assert made["bundle"] == str(output)
    assert made["bytes"] == sum(made["files"].values())
    assert set(made["stages"]) >= {"plan", "weights", "trace", "seal"}
    assert bundles.read(output).policy.name == "infinipot"
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_adapter_is_part_of_the_bundle_and_of_what_it_is_compared_with(
    cli: Cli, model_folder: Path, tmp_path: Path, pot_options: list[str], book: str
) -> None:
    from peft import LoraConfig, get_peft_model

    from tests import tiny

    settings: Any = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    base = tiny.model("llama-tied", vocab_size=307, num_hidden_layers=2)
    made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    made.save_pretrained(str(tmp_path / "novel-lora"))
    output, adapter = tmp_path / "b", ["--adapter", tmp_path / "novel-lora"]
    options = [*pot_options, "--policy", "streaming"]
    result = cli("build", model_folder, "-o", output, *adapter, *options)
    assert result.exit_code == 0, result.stderr
    assert bundles.read(output).source == "tiny llama + novel-lora"
    (tmp_path / "text").write_text(book, encoding="utf-8")
    verify = ["verify", output, "--model", model_folder, "--compressions", 3, "--steps", 8]
    result = cli(*verify, *adapter)
    assert result.exit_code == 0, result.stdout
    assert_refused(cli(*verify, "--json"), "not that of --model", "from tiny llama + novel-lora")
    measure = ["eval", output, "--text", tmp_path / "text", "--task", "perplexity"]
    measure += ["--documents", 1, "--question", "known", "--json"]
    result = cli(*measure, "--model", model_folder, *adapter)
    assert result.exit_code == 0, result.stderr
    assert "--adapter novel-lora" in json.loads(result.stdout)["command"]
    assert_refused(cli(*measure, *adapter), "--adapter is of a model")


def test_an_adapter_that_does_not_fit_is_refused_before_any_weight_is_read(
    cli: Cli, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    from tests import tiny

    settings: Any = {"target_modules": ["q_proj"]}
    made = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", **settings))
    made.save_pretrained(str(tmp_path / "lora"))
    monkeypatch.setattr("potexport.loader.load_model", None)
    options = ["-o", tmp_path / "b", "--adapter", tmp_path / "lora", "--json"]
    assert_refused(cli("build", model_folder, *options), "does not fit", "layers.2", "trained on")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_force_keeps_the_old_bundle_when_the_new_one_fails(
    cli: Cli,
    model_folder: Path,
    copy: Path,
    pot_options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (copy / "potexport.json").read_bytes()
    # Seconds that matter to another test.
    monkeypatch.setattr(route_onnx, "write", lambda *_: {"weights": "weights.safetensors"})

    def full(folder: Path, manifest: object) -> None:
        assert (copy / "potexport.json").read_bytes() == before
        raise OSError(28, "No space left on device", str(folder / "potexport.json"))

    monkeypatch.setattr(folders, "seal", full)
    result = cli("build", model_folder, "-o", copy, "--force", "--json", *pot_options)
    assert_refused(result, "No space left on device")
    monkeypatch.undo()
    assert (copy / "potexport.json").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert cli("run", copy, "hi", "--max-new-tokens", 2).exit_code == 0


@pytest.mark.parametrize("force", [False, True])
def test_a_killed_build_leaves_no_half_bundle(
    start: Start, cli: Cli, model_folder: Path, copy: Path, force: bool, pot_options: list[str]
) -> None:
    output = copy if force else copy.parent / "new.bundle"
    before = (copy / "potexport.json").read_bytes()
    process = start("build", model_folder, "-o", output, "--force")
    assert process.stderr
    # The first stage ends when the temporary folder is about to be made or is there.
    for line in process.stderr:
        if line.startswith(b"load the weights"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -9
    (left,) = copy.parent.glob(f".{output.name}.building-*")
    assert (copy / "potexport.json").read_bytes() == before
    assert output.exists() is force
    # The next build clears up, and is not hindered.
    with folders.new_folder(output, force=True):
        assert not left.exists()


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pot 40 --sink 20 --recent 20 --chunk 8", ("40 slots", "--pot at least 48")),
        ("--pot 48 --keep 48", ("--keep 48", "give at most 36")),
        ("--pot 48 --keep 2 --sink 2 --recent 4", ("--keep is 2", "(6)")),
        ("--pot 48 --keep-max 47", ("--keep-max 47", "at most")),
        ("--pot 0", ("--pot is 0", "at least 1")),
        ("--pot 511", ("511 slots", "512", "smaller --pot")),
        ("--sink -1", ("--sink is -1",)),
        ("--policy nosuch", ("'nosuch'", "infinipot, keydiff, knorm")),
        ("--target nosuch", ("'nosuch'", "cpu")),
        ("--policy streaming --alpha 0.1", ("alpha does not apply", "streaming")),
        ("--policy infinipot --alpha 1.5", ("--alpha is 1.5", "0 to 1")),
        ("--policy infinipot --pool 4", ("--pool is 4", "odd")),
        ("--opset 12", ("--opset is 12", "18 to 23")),
        ("--precision int3", ("int3", "fp32", "fp16")),
        ("--pot many", ("many", "build --help")),
        ("--pott 5", ("--pott", "--pot")),
    ],
)
def test_build_refuses_options(
    cli: Cli, model_folder: Path, tmp_path: Path, options: str, words: tuple[str, ...]
) -> None:
    result = cli("build", model_folder, "-o", tmp_path / "b", *options.split())
    assert_refused(result, *words)
    assert list(tmp_path.iterdir()) == []


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: set_config(folder, model_type="nosuch"),
            ("'nosuch'", "expected a decoder"),
        ),
        (lambda folder: set_config(folder, model_type="t5"), ("'t5'", "choose another")),
        (
            lambda folder: set_config(folder, model_type="x", auto_map={"AutoConfig": "c.C"}),
            ("--trust-remote-code",),
        ),
        (drop_tokenizer, ("no tokenizer", "tokenizer.json")),
        (pickle_only, ("pickle", "save_pretrained")),
        (lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json",)),
    ],
)
def test_build_refuses_models(
    cli: Cli, model_copy: Path, spoil: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    spoil(model_copy)
    result = cli("build", model_copy, "-o", model_copy.parent / "b")
    assert_refused(result, *words)
    assert [path.name for path in model_copy.parent.iterdir()] == ["model"]


def test_build_refuses_broken_weights_and_leaves_nothing(cli: Cli, model_copy: Path) -> None:
    truncate_weights(model_copy)
    result = cli("build", model_copy, "-o", model_copy.parent / "b", "--json")
    assert_refused(result, "weights cannot be loaded", "download")
    assert [path.name for path in model_copy.parent.iterdir()] == ["model"]


def test_build_refuses_places(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "file").write_text("too")
    assert_refused(cli("build", model_folder, "-o", tmp_path / "mine"), "exists", "--output")
    assert_refused(cli("build", model_folder, "-o", tmp_path / "mine", "--force"), "not a bundle")
    assert_refused(cli("build", model_folder, "-o", tmp_path / "file", "--force"), "not a bundle")
    within = cli("build", model_folder, "-o", tmp_path / "file" / "b", "--json")
    assert_refused(within, "choose another --output")
    assert_refused(cli("build", model_folder), "--output")
    assert_refused(cli("build", tmp_path / "nosuch", "-o", tmp_path / "b"), "does not exist")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
