"""Small checkpoints and GGUF files for the tests of the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potexport import loader
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


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **{"tie_word_embeddings": True, **changes},
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


def rewrite(
    folder: Path, more: dict[str, torch.Tensor] | None = None, **changed: torch.Tensor | None
) -> None:
    """Change tensors (named with _ for .) of a checkpoint; None drops one. more: is added."""
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    for name in list(weights):
        if name.replace(".", "_") in changed:
            weight = changed[name.replace(".", "_")]
            weights.pop(name)
            if weight is not None:
                weights[name] = weight
    weights |= more or {}
    path.unlink()  # a mapped file must not be written over
    save_file(weights, path, metadata={"format": "pt"})


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


def add_sizes(writer: Any, config: Any) -> None:
    """Those that every architecture's GGUF has."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)


def write_gguf(path: Path, facts: dict[str, Any], model: Any = None, **extra: Any) -> Source:
    """A GGUF of the tiny model, written as llama.cpp's converter would; None leaves a key out."""
    model = model or tiny_model()
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    add_sizes(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_chat_template(CHAT)
    for key, value in facts.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            if key.endswith("_id"):  # llama.cpp insists
                kind = gguf.GGUFValueType.UINT32
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
