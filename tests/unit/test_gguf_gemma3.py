"""Gemma 3 from GGUF: a tiny one with odd settings, and the real one."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from potexport import gguf_source, loader
from potexport.loader import Source
from tests import gemma3
from tests.reference_sentencepiece import SentencePiece
from tests.unit.checkpoints import ROOT, add_sizes, load, refusal

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "ca"]
RUNS = [" " * n for n in range(2, 8)] + ["\n", "\n\n", "<b>"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *RUNS, *(f"<0x{n:02X}>" for n in range(256)), *PIECES]
FACTS: dict[str, Any] = {
    "model": "llama",
    "pre": "default",
    "tokens": TOKENS,
    "scores": [-1000.0] * (4 + len(RUNS))
    + [0.0] * 256
    + [-9.0, -8.0, -7.0, -6.0, -3.0, -2.0, -1.0, -2.5, -4.0],
    "token_type": [3, 3, 3, 2, *[4] * len(RUNS), *[6] * 256, *[1] * len(PIECES)],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "unknown_token_id": 3,
    "padding_token_id": 0,
    "add_bos_token": True,
    "add_eos_token": False,
    "add_space_prefix": False,
}
NASTY = [
    *("a  b", "   abc", " " * 8, " " * 36, "a\n\n\nb", "<b>ab<b>", "\tab\t", "1813 and 3.14", ""),
    *("cabab caab  abc", "안녕 ab", "🙂ab🏽", "<eos>a<bos>", "<0x41>", "e\u0301é", "\r\n \n a "),
]


def tiny(layers: int = 3, **changes: Any) -> Any:
    torch.manual_seed(0)
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 18,
        "intermediate_size": 28,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "query_pre_attn_scalar": 10,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"][:layers],
        "rope_parameters": rope,
        "max_position_embeddings": 64,
    }
    model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**(settings | changes)))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_(0, 0.3)
    return model.eval()


def write(path: Path, model: Any, **facts: Any) -> Source:
    """As llama.cpp's converter writes a Gemma 3: norms with their 1, no layer types; None leaves
    a key out."""
    writer, config = gguf.GGUFWriter(path, "gemma3"), model.config
    add_sizes(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    tokens = {f"tokenizer.ggml.{key}": value for key, value in FACTS.items()}
    for key, value in (tokens | {f"gemma3.{key}": each for key, each in facts.items()}).items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            ours = names.get_name(name, try_suffixes=(".weight",))
            assert ours is not None, name
            writer.add_tensor(ours, (weight + ("norm" in name)).numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return loader.resolve(str(path))


SAID: dict[str, Any] = {
    "rope.freq_base": 5000.0,
    "rope.freq_base_swa": 300.0,
    "attention.sliding_window_pattern": [True, False, True],
}


def test_a_file_that_says_all_gives_the_model_it_was_made_from(tmp_path: Path) -> None:
    made = tiny()
    model = load(write(tmp_path / "tiny.gguf", made, **SAID))
    assert model.config.layer_types == made.config.layer_types
    ours, theirs = model.state_dict(), made.state_dict()
    for name in theirs:  # the 1 of a norm costs its last bit
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-7)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(4, 34)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, made(input_ids=ids).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("said", ["attention.sliding_window_pattern", "rope.freq_base_swa"])
def test_without_what_it_says_it_is_another_model(tmp_path: Path, said: str) -> None:
    """The sibling that must differ."""
    made = tiny()
    model = load(write(tmp_path / "tiny.gguf", made, **SAID | {said: None}))
    ids = torch.arange(4, 34)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - made(input_ids=ids).logits).abs().max() > 1e-4


def test_what_a_file_does_not_say_is_as_in_llama_cpp(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    source = write(tmp_path / "tiny.gguf", tiny(7, layer_types=kinds))
    config: Any = loader.read_config(source)
    assert config.layer_types == kinds
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1000000.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    assert (config.query_pre_attn_scalar, config.final_logit_softcapping) == (10, None)
    source = write(tmp_path / "three.gguf", tiny(), **{"attention.sliding_window_pattern": 3})
    config = loader.read_config(source)
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_queries_of_the_27b_have_a_scale_of_their_own(tmp_path: Path) -> None:
    kinds = ["full_attention"] * 62
    source = write(tmp_path / "tiny.gguf", tiny(62, layer_types=kinds))
    assert loader.read_config(source).query_pre_attn_scalar == 18 // 3


def test_a_linear_scaling_is_of_the_layers_that_see_all(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    source = write(tmp_path / "tiny.gguf", tiny(), **SAID, **linear)
    whole = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}
    local = {"rope_type": "default", "rope_theta": 300.0}
    both = {"full_attention": whole, "sliding_attention": local}
    assert loader.read_config(source).rope_parameters == both
    ids = torch.arange(4, 34)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load(source)(input_ids=ids).logits,
            tiny(rope_parameters=both)(input_ids=ids).logits,
            rtol=0,
            atol=1e-5,
        )


def test_another_scaling_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "tiny.gguf", tiny(), **{"rope.scaling.type": "yarn"})
    assert "rotary scaling 'yarn'" in refusal(loader.read_config, source)


def oracle(facts: dict[str, Any]) -> SentencePiece:
    return SentencePiece(*(facts[name] for name in ("tokens", "scores", "token_type")))


def test_a_tokenizer_is_sentencepiece_to_the_id(tmp_path: Path) -> None:
    tokenizer = loader.load_tokenizer(write(tmp_path / "tiny.gguf", tiny()))
    expected = oracle(FACTS)
    choose = random.Random(0)
    letters = [*" \t\n▁abc1é", "  ", "<b>", "<eos>", "🙂"]
    drawn = ["".join(choose.choices(letters, k=choose.randint(1, 30))) for _ in range(500)]
    for text in [*NASTY, *drawn]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text), text
        if "▁" not in text:  # the same token as a space
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("ab") == [2, TOKENS.index("ab")]
    loader.save_tokenizer(tokenizer, tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in NASTY:
        assert again.encode(text) == tokenizer.encode(text)


def test_merges_that_do_not_go_by_score_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: dict[str, Any], facts: dict[str, Any]) -> None:
        mend(state, facts)
        state["model"]["merges"].reverse()

    mend = gguf_source._mend_sentencepiece
    monkeypatch.setattr(gguf_source, "_mend_sentencepiece", spoil)
    source = write(tmp_path / "tiny.gguf", tiny())
    assert "differs in the order of merges" in refusal(loader.load_tokenizer, source)


# What the file of Gemma 3 270M says, and, of the two last, does not say (google/gemma-3-270m).
REAL = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
WEIGHTS = {  # llama.cpp's names and transformers', written down here and not taken from either
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weight_of(tensor: str) -> str:
    kind, *rest = tensor.removesuffix(".weight").split(".")
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    return (
        f"{outer[kind] if kind in outer else f'model.layers.{rest[0]}.{WEIGHTS[rest[1]]}'}.weight"
    )


@pytest.mark.slow
@gemma3.present
def test_gemma_3_from_its_gguf() -> None:
    source = loader.resolve(str(gemma3.GGUF))
    model = load(source)
    config = model.config.to_dict()
    assert {name: config[name] for name in REAL} == REAL
    ours, seen = model.state_dict(), {"lm_head.weight"}
    for tensor in gguf.GGUFReader(gemma3.GGUF).tensors:
        name = weight_of(tensor.name)
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours[name].numpy(), theirs - np.float32("norm" in tensor.name)), name
        seen.add(name)
    assert seen == set(ours)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.embed_scale == pytest.approx(math.sqrt(640))
    assert model.model.layers[0].self_attn.scaling == 256**-0.5
    tokenizer = loader.load_tokenizer(source)
    loader.tokenizer_matches(tokenizer, model.config)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    ids: Any = tokenizer("Water boils at a temperature of", return_tensors="pt")
    told = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert "100 degrees Celsius" in tokenizer.decode(told)
    novel = (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")
    ids = tokenizer(novel[20000:26000], return_tensors="pt")["input_ids"]
    with torch.no_grad():  # more than two windows; SmolLM2 has 0.759 nats a character here
        nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) / 6000
    assert 0.70 < nats < 0.75  # 0.741; of a model without its windows or with one base, more


@pytest.mark.slow
@gemma3.present
def test_its_tokenizer_is_sentencepiece_to_the_id() -> None:
    facts = gguf_source.metadata(gemma3.GGUF)
    named = {name: facts[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")}
    expected = oracle(named)
    tokenizer = loader.load_tokenizer(loader.resolve(str(gemma3.GGUF)))
    novel = (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")
    korean = "감사합니다. 각도기, ㅋㅋㅋ; 漢字 مرحبا 𒀀 Ⅷ²½ ﬁ \xa0\u2003\x01\x7f\ufffd 👩‍👩‍👧"
    code = "def f(x):\n\t\treturn x  # c\n" + " " * 40 + "<div><b>t</b></div>\r\n"
    turns = "<start_of_turn>user\nhi<end_of_turn>\n<unused5>x[multimodal]<bos><h1>"
    texts = [*NASTY, korean, code, turns, "\n" * 40, "\t" * 40, "a" * 100]
    texts += [novel[at : at + 500] for at in range(0, len(novel), 20000)]
    choose = random.Random(0)
    letters = [*" \n\t▁abcEé1290.<>/🙂한국あ漢\u200d\u0300", "<h1>", "<unused9>", "  ", "the"]
    texts += ["".join(choose.choices(letters, k=choose.randint(1, 60))) for _ in range(1000)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text), text
        if "▁" not in text:
            assert tokenizer.decode(ids) == text
