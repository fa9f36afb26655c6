"""Tiny random models with odd sizes, so that two mixed-up dimensions never fit by chance.

Random weights have no attention sinks and little structure: they prove plumbing, not quality. They
are scaled up, for with transformers' small initial weights every attention is nearly uniform and a
wrong one would pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = """On the first of April the clocks of the town were striking for 13 sheep and 42 goats.
The quick brown fox jumps over the lazy dog; the dog, who is called Rex, does not mind at all.
Nobody had told the fox that the year was 1984, nor that the number of the house was 7.
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 42,
    "intermediate_size": 58,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens with ChatML's special tokens and template."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEXT] * 3, trainer)
    kind: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = kind(
        tokenizer_object=fast,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family in FAMILIES, fp32, whose attention is far from uniform."""
    config_class, model_class, extra = FAMILIES[family]
    vocabulary = len(tokenizer())
    config = config_class(**{"vocab_size": vocabulary, **SIZES, **extra, **changes})
    torch.manual_seed(seed)
    made = model_class(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.mul_(6.0)
        elif weight.dim() > 1:
            weight.mul_(20.0)
        elif "bias" in name:
            weight.normal_(std=0.5)
        else:
            weight.add_(torch.randn_like(weight) * 0.2)
    assert isinstance(made, PreTrainedModel)
    return made


def save(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with such a model and its tokenizer."""
    made = model(family, seed=seed, **changes)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
