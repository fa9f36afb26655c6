"""The loader: what it accepts, the words of each refusal, and the mending of a GGUF's tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
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
        ({"model_type": "mamba"}, "'mamba' has layers that keep a state in place of keys"),
        ({"model_type": "jamba"}, "'jamba' has layers that keep a state in place of keys"),
        ({"model_type": "rwkv"}, "'rwkv' keeps a recurrent state"),
        ({"model_type": "gemma3"}, "'gemma3' is multimodal; its text decoder alone, a gemma3_text"),
        ({"model_type": "gemma3"}, "save it as a Gemma3ForCausalLM, as docs/build.md shows"),
        ({"model_type": "llava"}, "'llava' is multimodal; its text decoder alone, a llama, may do"),
        ({"model_type": "qwen2_5_vl"}, "'qwen2_5_vl' is multimodal, and transformers has no class"),
        ({"model_type": "phi4_multimodal"}, "'phi4_multimodal' is multimodal"),
        ({"model_type": "whisper"}, "'whisper' is an encoder-decoder"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}, "--trust-remote-code"),
        *[
            ({"model_type": "llama", "quantization_config": {"quant_method": name}}, f"({name})")
            for name in ("gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors")
        ],
        (
            {"model_type": "llama", "quantization_config": {"load_in_4bit": True}},
            "is quantized already (bitsandbytes)",
        ),
        (
            {"model_type": "llava", "text_config": {"quantization_config": {"bits": 4}}},
            "is quantized already (no name)",
        ),
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


@pytest.mark.parametrize(
    "name", ["q_proj.qweight", "q_proj.weight_scale_inv", "q_proj.SCB", "q_proj.weight_blocks"]
)
def test_load_model_refuses_codes_that_the_config_is_silent_of(folder: Path, name: str) -> None:
    name = f"model.layers.0.self_attn.{name}"
    rewrite(folder, {name: torch.ones(4)})
    assert f"is quantized already (it has {name})" in refusal(load, loader.resolve(str(folder)))


def test_a_checkpoint_in_shards_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="6KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    ours, theirs = load(loader.resolve(str(tmp_path))).state_dict(), tiny_model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shards[1].unlink()
    message = refusal(load, loader.resolve(str(tmp_path)))
    assert shards[1].name in message
    assert "download the checkpoint again" in message


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_or_its_own_as_the_config_says(tmp_path: Path, tied: bool) -> None:
    made = tiny_model(tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    model = load(loader.resolve(str(tmp_path)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_checkpoint_in_fp32_has_the_same_values(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {dtype}
    model = load(loader.resolve(str(tmp_path))).state_dict()
    for name, weight in stored.items():
        assert model[name].dtype == torch.float32
        assert torch.equal(model[name], weight.float())


def test_the_text_decoder_of_a_multimodal_model_is_accepted_alone(tmp_path: Path) -> None:
    """As docs/build.md shows."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config={**sizes, **heads, "vocab_size": len(TOKENS), "max_position_embeddings": 64},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    kind, auto = cast("Any", Gemma3ForConditionalGeneration), cast("Any", AutoModelForCausalLM)
    whole = kind(config).eval()
    alone = auto.from_config(whole.config.get_text_config())
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        mine = load(loader.resolve(str(tmp_path)))(ids).logits
        assert torch.equal(mine, whole(input_ids=ids).logits)


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
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(loader, "_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert loader.resolve("org/name@main") == Source("hub", "org/name", "main")
    names = ["config.json", "adapter_config.json"]
    assert asked == [("org/name", name, "main") for name in names]
