"""Decoders that a pot cannot hold: one line that names the reason, before anything is written.

The messages go into docs/models.md, as the families' figures do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from potexport import pipeline
from potexport.errors import PotexportError
from tests import tiny
from tests.families.proof import ASKED

SMALL = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
OLD = {**SMALL, "n_layer": 2, "n_head": 6}
NEW = {**tiny.SIZES, "vocab_size": 300}
LATENT = {"num_key_value_heads": 6, "head_dim": 4, "n_routed_experts": 4, "q_lora_rank": 20,
          "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
          "first_k_dense_replace": 3}  # fmt: skip
SHARED = {"vocab_size_per_layer_input": 300, "num_kv_shared_layers": 1, "laurel_rank": 4,
          "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 8,
          "altup_num_inputs": 2, "activation_sparsity_pattern": None}  # fmt: skip


def _made(model: str, config: str, **sizes: Any) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def _gpt2() -> Any:
    return _made("GPT2LMHeadModel", "GPT2Config", n_embd=60, n_positions=512, **OLD)


def _opt() -> Any:
    sizes = {"hidden_size": 60, "word_embed_proj_dim": 60, "ffn_dim": 58, "num_hidden_layers": 2}
    return _made("OPTForCausalLM", "OPTConfig", num_attention_heads=6, **sizes, **SMALL)


def _hunyuan() -> Any:
    """Trained norms behind the rotation, one number an element: what turns is no longer a key."""
    made = _made("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", **NEW)
    for name, weight in made.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return made


def _mistral() -> Any:
    return tiny.FAMILIES["mistral"].make(vocab_size=300, sliding_window=20)


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (_gpt2, "gpt2 has no rotary positions"),
    "opt": (_opt, "opt has no rotary positions"),
    "bloom": (
        lambda: _made("BloomForCausalLM", "BloomConfig", hidden_size=60, **OLD),
        "lacks max_position_embeddings; expected a decoder with rotary positions",
    ),
    "falcon (alibi)": (
        lambda: tiny.FAMILIES["falcon"].make(vocab_size=300, alibi=True),
        "a bias by distance",
    ),
    "hunyuan_v1_dense": (_hunyuan, "does not rotate its keys in any known way"),
    "deepseek_v3": (
        lambda: _made("DeepseekV3ForCausalLM", "DeepseekV3Config", **{**NEW, **LATENT}),
        "a pot takes heads of one size",
    ),
    "gemma3n_text": (
        lambda: _made("Gemma3nForCausalLM", "Gemma3nTextConfig", **NEW, **SHARED),
        "layers that read the keys of others",
    ),
    "llama4_text": (
        lambda: _made("Llama4ForCausalLM", "Llama4TextConfig", num_local_experts=2, **NEW),
        "see the tokens of their own chunk alone",
    ),
    "mistral (window)": (_mistral, "every layer looks back only 20 tokens"),
    "mamba": (
        lambda: _made("MambaForCausalLM", "MambaConfig", hidden_size=60, **SMALL),
        "keep a state in place of keys and values",
    ),
    "t5": (
        lambda: _made("T5ForConditionalGeneration", "T5Config", vocab_size=300, num_layers=1),
        "is an encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_reason(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    make, reason = CASES[name]
    made = make()
    made.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    asked = pipeline.Options(model=str(tmp_path / "model"), **ASKED)
    with pytest.raises(PotexportError, match=reason) as caught:
        pipeline.build(asked, tmp_path / "bundle")
    message = str(caught.value).replace(f"{tmp_path / 'model'}", "MODEL")
    record_property("family", {"refused": name, "message": message})
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
