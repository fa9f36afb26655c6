"""Tiny random models with odd sizes, so that two mixed-up dimensions never fit by chance.

Random weights have no attention sinks and little structure: they prove plumbing, not quality. They
are scaled up, for with transformers' small initial weights every attention is nearly uniform and a
wrong one would pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
NO_HEAD_DIM = ("head_dim",)  # of configurations that have none: E / Hq
WINDOW = 13
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family by the name of its classes in transformers.

    changes: to SIZES. without: those of SIZES that its configuration does not have.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()
    config: str = ""  # the configuration's class, where it is not named like the model's

    def make(self, **changes: Any) -> Any:
        """A random model as transformers makes it; `changes` override its own."""
        sizes = {key: size for key, size in SIZES.items() if key not in self.without}
        config_class = getattr(transformers, self.config or f"{self.name}Config")
        asked = {**sizes, **self.changes, **changes}
        for name in ("layer_types", "no_rope_layers"):  # of fewer layers the last
            if name in self.changes and name not in changes:
                asked[name] = asked[name][-asked["num_hidden_layers"] :]
        config = config_class(**asked)
        return getattr(transformers, f"{self.name}ForCausalLM")(config)


# On the CPU, transformers' grouped products want rows of a multiple of 16 bytes.
EXPERTS = {"hidden_size": 44, "intermediate_size": 52, "num_experts_per_tok": 2}
E60, E72 = {"hidden_size": 60}, {"hidden_size": 72}  # for heads of 10 and 12
FALCON = (*NO_HEAD_DIM, "intermediate_size", "num_key_value_heads")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.67,  # of 12: 8
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.3, 5.1, 7.9],
}
GEMMA3_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 700.0},
    FULL: {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "llama-tied": Family("Llama", {"tie_word_embeddings": True}),
    "llama-bias": Family("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": Family("Llama", {"rope_parameters": LLAMA3}),
    "mistral": Family("Mistral", {"sliding_window": None}),
    "ministral": Family(
        "Ministral", {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": WINDOW}
    ),
    "qwen2": Family("Qwen2"),
    "qwen2-windows": Family(
        "Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Family("Qwen3"),
    "qwen3-moe": Family(
        "Qwen3Moe",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 28,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": Family("Mixtral", {**EXPERTS, "num_local_experts": 4}),
    "olmoe": Family("Olmoe", {**EXPERTS, **E60, "num_experts": 4}, NO_HEAD_DIM),
    "olmo2": Family("Olmo2", E60, NO_HEAD_DIM),
    "olmo3": Family(
        "Olmo3",
        {**E60, "layer_types": [SLIDING, SLIDING, FULL], "sliding_window": WINDOW},
        NO_HEAD_DIM,
    ),
    "smollm3": Family("SmolLM3", {**E60, "no_rope_layers": [1, 0, 1]}, NO_HEAD_DIM),
    "gemma": Family("Gemma"),
    "gemma2": Family(
        "Gemma2",
        {
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 8.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": Family(
        "Gemma3",
        {
            "layer_types": [SLIDING, SLIDING, FULL],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 7,
            "rope_parameters": GEMMA3_ROPE,
        },
        config="Gemma3TextConfig",
    ),
    "phi": Family("Phi", E72, NO_HEAD_DIM),  # turns 6 of 12
    "phi3": Family("Phi3", E60, NO_HEAD_DIM),
    "phi4-mini": Family(
        "Phi3",
        {**E72, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        NO_HEAD_DIM,
    ),
    "gpt-oss": Family(
        "GptOss",
        {
            **EXPERTS,
            "num_local_experts": 4,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": WINDOW,
        },
    ),
    "granite": Family(
        "Granite",
        {
            **E60,
            "embedding_multiplier": 1.7,
            "logits_scaling": 3.1,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.23,
        },
        NO_HEAD_DIM,
    ),
    "stablelm": Family(
        "StableLm",
        {**E72, "use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.34},  # 4
        NO_HEAD_DIM,
    ),
    "gpt-neox": Family(
        "GPTNeoX", {**E72, "rotary_pct": 0.34}, (*NO_HEAD_DIM, "num_key_value_heads")
    ),
    "glm": Family("Glm", {"head_dim": 12}),  # turns 6
    "glm4": Family("Glm4", {"head_dim": 12}),
    "cohere": Family("Cohere", {**E60, "logit_scale": 0.4, "use_qk_norm": True}, NO_HEAD_DIM),
    "cohere2": Family(
        "Cohere2",
        {
            **E60,
            "logit_scale": 0.4,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": WINDOW,
        },
        NO_HEAD_DIM,
    ),
    "falcon": Family("Falcon", {**E60, "ffn_hidden_size": 58}, FALCON),
    "falcon-gqa": Family(
        "Falcon",
        {**E60, "ffn_hidden_size": 58, "new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON,
    ),
    "starcoder2": Family("Starcoder2", E60, NO_HEAD_DIM),
    "helium": Family("Helium", E60),
    "ernie4_5": Family("Ernie4_5"),
    "exaone4": Family(
        "Exaone4",
        {**E60, "layer_types": [SLIDING, SLIDING, FULL], "sliding_window": WINDOW},
        NO_HEAD_DIM,
    ),
    "nemotron": Family("Nemotron", {"head_dim": 12}),  # turns 6
    "seed_oss": Family("SeedOss"),
    "arcee": Family("Arcee"),
    "apertus": Family("Apertus", {**E60, "rope_parameters": LLAMA3}, NO_HEAD_DIM),
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
    torch.manual_seed(seed)
    made = FAMILIES[family].make(**{"vocab_size": len(tokenizer()), **changes})
    made.eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        # What norms multiply with stays near 1, also where each head has its own, [heads, D].
        if weight.dim() > 1 and "norm" not in name:
            weight.mul_(20.0 if "embed" in name else 6.0)
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
