"""The loader: what it accepts, the words of each refusal, and the mending of a GGUF's tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from potexport import loader
from potexport.loader import Source
from tests.unit.checkpoints import (
    DIGITS,
    DIGITS_SPLIT,
    TOKENS,
    byte_level_facts,
    load,
    refusal,
    rewrite,
    tiny_model,
    tiny_tokenizer,
    write_gguf,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_resolve_refuses_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(loader.resolve, str(folder))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth"])
def test_resolve_refuses_pickles(folder: Path, pickle: str) -> None:
    (folder / "model.safetensors").rename(folder / pickle)
    message = refusal(loader.resolve, str(folder))
    assert pickle in message
    assert "no pickle is ever loaded" in message


def test_resolve_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "expected .safetensors weights, found none" in refusal(loader.resolve, str(folder))


def test_resolve_refuses_a_folder_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(loader.resolve, str(folder))


def test_a_hub_id_out_of_reach_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_offline", lambda: True)
    message = refusal(loader.resolve, "nobody-here/no-such-model@v1")
    assert "nobody-here/no-such-model@v1" in message
    assert "no network" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llamma"}, "model_type 'llamma' is unknown"),
        ({"hidden_size": 4}, "names no model_type"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
        ({"model_type": "bert"}, "'bert' is a bidirectional encoder"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"model_type": "mamba"}, "'mamba' has layers without a plain key/value cache"),
        ({"model_type": "rwkv"}, "'rwkv' keeps a recurrent state"),
        ({"model_type": "gemma3"}, "'gemma3' is multimodal"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}, "--trust-remote-code"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "(gptq)"),
        ({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}, "quantized"),
        ({"model_type": "llama", "num_attention_heads": "many"}, "cannot be read"),
    ],
)
def test_read_config_refuses(folder: Path, config: dict[str, Any], expected: str) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert expected in refusal(loader.read_config, loader.resolve(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_read_config_refuses_what_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "names no model_type" in refusal(loader.read_config, loader.resolve(str(folder)))


def test_read_config_runs_trusted_code_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(
        "from transformers import PreTrainedConfig\n"
        "class Own(PreTrainedConfig):\n    model_type = 'own_tiny'\n",
        encoding="utf-8",
    )
    config = {"model_type": "own_tiny", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = loader.resolve(str(folder))
    assert "--trust-remote-code" in refusal(loader.read_config, source)
    assert loader.read_config(source, trust_remote_code=True).model_type == "own_tiny"


def test_a_known_model_needs_no_trust_for_code_it_does_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Own"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert loader.read_config(loader.resolve(str(folder))).model_type == "llama"


def test_load_model_from_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model = load(loader.resolve(str(folder)))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert "".join(capfd.readouterr()) == ""
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ours, theirs = model.state_dict(), tiny_model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load(loader.resolve(str(folder)), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_load_model_names_a_tensor_that_is_not_finite(folder: Path, value: float) -> None:
    rewrite(folder, model_norm_weight=torch.tensor([1.0] * 15 + [value]))
    message = refusal(load, loader.resolve(str(folder)))
    assert "tensor model.norm.weight holds NaN or infinity" in message


def test_load_model_names_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, model_layers_1_mlp_up_proj_weight=None)
    message = refusal(load, loader.resolve(str(folder)))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in message


def test_load_model_refuses_broken_weights(folder: Path) -> None:
    rewrite(folder, model_norm_weight=torch.ones(8))
    assert "cannot be loaded" in refusal(load, loader.resolve(str(folder)))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:1000])
    assert "cannot be loaded" in refusal(load, loader.resolve(str(folder)))


def test_a_folders_tokenizer_is_its_tokenizer_json(folder: Path) -> None:
    tokenizer = loader.load_tokenizer(loader.resolve(str(folder)))
    assert "|".join(tokenizer.tokenize(DIGITS)) == DIGITS_SPLIT
    assert tokenizer.eos_token_id == 2


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer cannot be loaded" in refusal(
        loader.load_tokenizer, loader.resolve(str(folder))
    )


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    tokenizer, config = tiny_tokenizer(), tiny_model().config
    loader.tokenizer_matches(tokenizer, config)
    config.vocab_size = len(TOKENS) - 1
    message = refusal(loader.tokenizer_matches, tokenizer, config)
    assert f"{len(TOKENS)} ids" in message
    assert f"{len(TOKENS) - 1} embeddings" in message


def test_save_tokenizer_lists_what_it_wrote(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert loader.save_tokenizer(tokenizer, tmp_path) == names
    tokenizer.chat_template = None
    assert loader.save_tokenizer(tokenizer, tmp_path / "base") == names[1:]


def test_save_checkpoint_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    message = refusal(loader.save_checkpoint, tiny_model(), tiny_tokenizer(), tmp_path / "taken")
    assert "not empty" in message
    monkeypatch.setattr(loader, "save_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        loader.save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_resolve_tells_folder_and_gguf_apart(folder: Path, tmp_path: Path) -> None:
    assert loader.resolve(str(folder)) == Source("folder", str(folder))
    source = write_gguf(tmp_path / "tiny.gguf", byte_level_facts())
    assert source == Source("gguf", str(tmp_path / "tiny.gguf"))


def test_a_hub_repository_is_fetched_at_its_revision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, name: str, **where: Any) -> str:
        asked.append((repository, name, where["revision"]))
        return str(folder / name)

    monkeypatch.setattr(loader, "_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert loader.resolve("org/name@main") == Source("hub", "org/name", "main")
    assert asked == [("org/name", "config.json", "main")]
