"""Tokenizers on texts that break them, against transformers': small ones made here, and, where they
are, SmolLM2's and Gemma 3's as a bundle has them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.runtime.text import Text
from tests import gemma3, smollm2
from tests.unit.chats import TOKENIZER, sentencepiece_like

NASTY = {
    "nothing": "",
    "families and flags": "👩‍👩‍👧‍👦 🏳️‍🌈 🇰🇷🇺🇳 1️⃣ 👍🏽👍🏿 ❤️❤",
    "half a flag, a lone joiner": "🇰 \u200d\ufe0f x\u200dy",
    "hangul": "한국어를 배우고 있어요. 값 닭 뷁",
    "jamo": unicodedata.normalize("NFD", "한국어 값") + " ㅋㅋㅋ ᄒ",
    "both directions": "abc שלום עולם def مرحبا بالعالم 123 \u202eevil\u202c \u2067x\u2069",
    "composed": "Å é ñ ḱṷṓn ﬁ ½ Å",
    "decomposed": unicodedata.normalize("NFD", "Å é ñ ḱṷṓn"),
    "stacked marks": "z̷͎̊a̵͓͠l̸̰̈g̶̠̀o " + "a" + "\u0301" * 40,
    "line ends": "a\r\nb\rc\n\n\r\n\u2028d\u2029e\x85f\x0bg\x0ch",
    "controls": "a\0b\x00\x00 \x01\x1b[31m\x7f\ufeffx\ufffe",
    "runs of blanks": " \t  x" + " " * 300 + "y\t\t\t\t" + "\u00a0\u3000\u2003 z ",
    "blanks alone": " " * 65,
    "names of control tokens": "<|im_start|>system\n<|im_end|><|endoftext|> <s></s> <bos><eos>",
    "nearly such names": "<|im_end| > <|im_<|im_end|>end|> <s <s/> [INST] <start_of_turn>",
    "bytes by name": "<0x41> <0xFF> ▁x ▁▁ Ġ Ċ Ã©",
    "scripts": "東京都 ภาษาไทย हिन्दी ქართული አማርኛ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
    "beyond Unicode's first plane": "\U0010ffff\U000e0001\U0001f9ff",
    "replacement characters": "\ufffd\ufffd a\ufffd",
    "code": "if (a<=b) {\n\treturn x**2;  // ½\n}\n" + "=" * 200,
    "numbers": "1234567890123 3.14159 1e-10 ١٢٣ ⅷ ²³",
    "one long word": "x" * 5000,
}


@dataclass(frozen=True)
class Pair:
    """Ours and theirs, of the same files. bytewise: of bytes, so that a text that was encoded is
    decoded to the letter; others have tokens for characters, and for bytes of rare ones."""

    ours: Text
    theirs: Any
    bytewise: bool


def _pair(folder: Path, *, bytewise: bool) -> Pair:
    from transformers import PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast
    return Pair(Text.open(folder), kind.from_pretrained(folder), bytewise)


def _small(tokenizer: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))

    return save


def _of(gguf: Path) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        from potexport import loader

        loader.save_tokenizer(loader.load_tokenizer(loader.resolve(str(gguf))), folder)

    return save


KINDS = {
    "byte-level": (_small(TOKENIZER), True),
    "byte fallback": (_small(sentencepiece_like()), False),  # a first blank goes
    "smollm2": (_of(smollm2.GGUF), True),
    "gemma3": (_of(gemma3.GGUF), False),  # "▁" is a blank
}
REAL = {"smollm2": smollm2.needed, "gemma3": gemma3.needed}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=REAL.get(name, [])) for name in KINDS]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    save, bytewise = KINDS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    save(folder)
    return _pair(folder, bytewise=bytewise)


@pytest.mark.parametrize("name", NASTY)
def test_ids_and_texts_are_those_of_transformers(pair: Pair, name: str) -> None:
    text, ours, theirs = NASTY[name], pair.ours, pair.theirs
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, special=True).tolist() == theirs.encode(text)
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert ours.decode(ids) == theirs.decode(ids, **plain)


@pytest.mark.parametrize("name", NASTY)
def test_typed_text_is_letters_and_comes_back(pair: Pair, name: str) -> None:
    """Piece by piece as a whole, and each piece of whole characters."""
    text, ours = NASTY[name], pair.ours
    ids = ours.encode(text, trusted=False).tolist()
    assert not ours.special_ids & set(ids)
    stream = ours.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == ours.decode(ids)
    if pair.bytewise:
        assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def once(text: str) -> str:
    """Malformed bytes may give another number of U+FFFD, piece by piece."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_any_ids_give_whole_characters(pair: Pair) -> None:
    """Whatever a model says; not a character is lost or comes twice."""
    ours = pair.ours
    # Bytes that are not a character by themselves are a few of many tokens.
    parts = sorted({i for name in NASTY for i in ours.encode(NASTY[name], trusted=False).tolist()})
    token = st.one_of(st.sampled_from(parts), st.integers(0, len(pair.theirs) + 3))

    @settings(max_examples=150, deadline=None)
    @given(st.lists(token, max_size=31))
    def check(ids: list[int]) -> None:
        stream = ours.stream()
        pieces = [stream.push(i) for i in ids]
        said, decoded = "".join(pieces) + stream.flush(), ours.decode(ids)
        # Byte fallback decodes a run with a malformed byte to nothing else, also what was said.
        if pair.bytewise or "\ufffd" not in decoded:
            assert once(said) == once(decoded)

    check()
