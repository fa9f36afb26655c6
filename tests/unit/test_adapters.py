"""LoRA adapters: merged, the model computes what peft computes beside it; what does not fit is
refused before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from potexport import adapters, facts, loader
from potexport.adapters import WEIGHTS
from tests import tiny
from tests.unit.checkpoints import refusal

IDS = torch.arange(3, 60)[None]
# Of the largest logit: peft adds what two products make, the merge adds the weights. Measured
# 1.0e-5 for all linear layers, at most 6e-6 for the rest; without the adapter it is more than 1.
TOLERANCE = 5e-5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "base")


def write(folder: Path, model: Any, *, seed: int = 5, **settings: Any) -> Path:
    """An adapter as peft saves it, with weights that matter."""
    settings = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn_like(weight) * (0.3 if "lora_" in name else 1.0)
    wrapped.save_pretrained(str(folder))
    return folder


def merged(base: Path, *given: Path, dtype: torch.dtype = torch.float32) -> Any:
    return adapters.load_model(
        loader.resolve(str(base)),
        adapters.find([str(each) for each in given]),
        dtype=dtype,
        attn_implementation="eager",
    )


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "bias": "none"},
        {"target_modules": ["down_proj", "o_proj"], "use_dora": True},
        {"use_rslora": True, "rank_pattern": {"v_proj": 5}},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm", "lm_head"]},
    ],
    ids=["plain", "all-linear", "dora", "rslora", "embeddings", "modules-to-save"],
)
def test_merged_is_what_peft_computes_unmerged(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = write(tmp_path / "adapter", tiny.model(), **settings)
    plain = logits(tiny.model())
    wanted = logits(PeftModel.from_pretrained(tiny.model(), str(folder)).eval())
    model = merged(base, folder)
    assert (plain - wanted).abs().max() > 1e4 * TOLERANCE * wanted.abs().max()
    assert (logits(model) - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    untouched = tiny.model()
    assert type(model) is type(untouched)
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert [type(each) for each in model.modules()] == [type(m) for m in untouched.modules()]
    assert not hasattr(model, "peft_config")
    assert not any(weight.requires_grad for weight in model.parameters())


def test_adapters_are_merged_one_after_another(base: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", tiny.model())
    two = write(tmp_path / "two", tiny.model(), seed=6, target_modules=["q_proj", "up_proj"])
    model: Any = PeftModel.from_pretrained(tiny.model(), str(one), adapter_name="one")
    model.load_adapter(str(two), adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    wanted = logits(model.eval())
    assert (logits(merged(base, one, two)) - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_is_rounded_once(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    exact, rounded = merged(base, folder).state_dict(), merged(base, folder, dtype=dtype)
    assert rounded.dtype == dtype
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, weight in rounded.state_dict().items():
        assert torch.equal(weight, exact[name].to(dtype)), name


def test_what_fits_is_known_without_a_weight_and_leaves_the_model_alone(
    base: Path, tmp_path: Path
) -> None:
    config = loader.read_config(loader.resolve(str(base)))
    empty = facts.without_storage(config, trust_remote_code=False)
    before = list(empty.state_dict()), facts.parameters(empty)
    settings: dict[str, Any] = {"use_dora": True, "init_lora_weights": "pissa"}
    found = adapters.find([str(write(tmp_path / "adapter", tiny.model(), **settings))])
    adapters.fit(found, empty)
    assert (list(empty.state_dict()), facts.parameters(empty)) == before


def spoil_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}
    change(weights)
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 36}, ("q_proj.lora_A.weight is [3, 36]", "must be [3, 42]")),
        ({"num_hidden_layers": 4}, ("layers.3.self_attn.q_proj", "no place for")),
        ({"num_hidden_layers": 2}, ("layers.2.self_attn.q_proj", "it lacks, for this model,")),
    ],
    ids=["width", "deeper", "shallower"],
)
def test_an_adapter_of_another_model_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = write(tmp_path / "adapter", tiny.model(**changes))
    config = loader.read_config(loader.resolve(str(base)))
    empty = facts.without_storage(config, trust_remote_code=False)
    message = refusal(adapters.fit, adapters.find([str(folder)]), empty)
    assert all(word in message for word in (*words, "does not fit", "trained on")), message


def test_an_adapter_of_modules_that_are_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    path = folder / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["c_attn"]}))
    message = refusal(merged, base, folder)
    assert "does not fit a llama (Target modules {'c_attn'} not found" in message


def test_new_rows_of_the_embedding_are_refused(base: Path, tmp_path: Path) -> None:
    larger = tiny.model()
    larger.resize_token_embeddings(larger.config.vocab_size + 2)
    saved = write(tmp_path / "saved", larger, modules_to_save=["embed_tokens", "lm_head"])
    rows = tiny.model().config.vocab_size
    message = refusal(merged, base, saved)
    assert f"has {rows + 2} rows of lm_head, which has {rows} in the model" in message
    some = write(tmp_path / "some", tiny.model(), trainable_token_indices=[7, 8])
    assert "trained 2 rows of model.embed_tokens" in refusal(merged, base, some)


def test_a_change_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "tied", "llama-tied")
    model = tiny.model("llama-tied")
    folder = write(tmp_path / "adapter", model, target_modules=["embed_tokens"])
    assert "embedding and head of this model at once" in refusal(merged, base, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(base: Path, tmp_path: Path, value: float) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    spoil_weights(folder, lambda weights: weights[FIRST].view(-1)[5].fill_(value))
    assert f"NaN or infinity in {FIRST}" in refusal(merged, base, folder)


def test_a_merge_that_overflows_the_type_is_refused(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    spoil_weights(folder, lambda weights: weights[FIRST].mul_(1e6))
    merged(base, folder)
    message = refusal(merged, base, folder, dtype=torch.float16)
    assert "layers.0.self_attn.q_proj.weight holds NaN or infinity in torch.float16" in message


def test_what_is_no_lora_adapter_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    weights = folder / WEIGHTS
    assert "is no adapter" in refusal(adapters.find, [str(tmp_path / "nosuch")])
    assert "is no adapter" in refusal(adapters.find, [str(tmp_path)])
    broken = weights.read_bytes()[:200]
    weights.rename(folder / "adapter_model.bin")
    assert "no pickle is ever loaded" in refusal(adapters.find, [str(folder)])
    weights.write_bytes(broken)
    assert "cannot be read" in refusal(adapters.fit, adapters.find([str(folder)]), tiny.model())
    (folder / adapters.CONFIG).write_text("{}")
    assert "names no peft_type" in refusal(adapters.find, [str(folder)])
    prompt: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny.model(), prompt).save_pretrained(str(tmp_path / "prompt"))
    message = refusal(adapters.find, [str(tmp_path / "prompt")])
    assert "kind PROMPT_TUNING; only LORA" in message


@pytest.mark.parametrize("setting", adapters.UNMERGED)
def test_what_is_more_than_a_change_of_weights_is_refused(tmp_path: Path, setting: str) -> None:
    path = write(tmp_path / "adapter", tiny.model()) / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: [[0, 1], [0, 2]]}))
    assert f"has {setting}, which is more" in refusal(adapters.find, [str(path.parent)])


def test_an_adapter_of_the_hub_out_of_reach_is_refused_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "_offline", lambda: True)
    message = refusal(adapters.find, ["nobody-here/no-such-adapter"])
    assert "no network, and not in the cache" in message


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_were_trained_are_merged(tmp_path: Path, bias: str) -> None:
    base = tiny.save(tmp_path / "base", "qwen2")
    folder = write(tmp_path / "adapter", tiny.model("qwen2"), bias=bias)
    wanted = logits(PeftModel.from_pretrained(tiny.model("qwen2"), str(folder)).eval())
    assert (logits(merged(base, folder)) - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_without_peft_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'potexport[adapters]'" in refusal(adapters.find, ["anything"])
    assert adapters.find([]) == ()


def test_an_adapter_is_no_model(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tiny.model())
    assert "with --adapter" in refusal(loader.resolve, str(folder))
    (base / adapters.CONFIG).write_bytes((folder / adapters.CONFIG).read_bytes())
    assert "with --adapter" in refusal(loader.resolve, str(base))
