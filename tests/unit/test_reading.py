"""Documents, the cuts between their pieces, and what stands around them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from potexport.errors import PotexportError
from potexport.runtime import reading
from potexport.runtime.reading import Document, frame, pieces
from potexport.runtime.text import Text
from tests.unit.chats import CHATML

ROOT = Path(__file__).resolve().parents[2]
BOOK = (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")[:40_000]
# As in Llama 3's tokenizer.json: line ends belong to what stands before them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    ),
}


def bpe(splitter: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Blanks and line ends in runs, so that they have tokens of their own.
    tokenizer.train_from_iterator([BOOK, "a\n\nb \n  \n\n\nc\n \nd  " * 500], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=SPLITTERS)
def text(request: pytest.FixtureRequest) -> Text:
    return Text(bpe(SPLITTERS[request.param]), template=None, specials={})


def blanks(rng: random.Random) -> str:
    words = BOOK.split()
    ends = ("\n", "\n\n", " \n", "\n ", "  ", " ", "\n\n\n", "\t", ".\n", "!\n\n")
    return "".join(rng.choice(words) + rng.choice(ends) for _ in range(6000))


TEXTS = {
    "book": BOOK,
    "no line ends": BOOK.replace("\n", " "),
    "all sorts of blanks": blanks(random.Random(0)),
    "one line a paragraph": BOOK.replace("\n", "\n\n"),
    "specials": BOOK.replace("\n", "<s>\n"),
    "東京": "東京は日本の首都です。\n" * 3000,
    "blank": " \n" * 9000,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("trusted", [False, True])
def test_pieces_are_the_whole(text: Text, name: str, trusted: bool) -> None:
    document = TEXTS[name]
    found = list(pieces(text, Document.of(document).blocks(3000), trusted=trusted))
    assert np.array_equal(np.concatenate(found), text.encode(document, trusted=trusted))
    if name == "blank":  # one run of blanks has no safe cut
        assert len(found) == 1
    else:
        assert len(found) > len(document) // 3000 // 3


def test_a_cut_in_any_place_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_joins", lambda *_, **__: True)
    for name in ("gpt2", "llama3"):
        text = Text(bpe(SPLITTERS[name]), template=None, specials={})
        found = pieces(text, Document.of(TEXTS["all sorts of blanks"]).blocks(3000), trusted=True)
        whole = text.encode(TEXTS["all sorts of blanks"])
        if not np.array_equal(np.concatenate(list(found)), whole):
            return
    pytest.fail("every cut was right without being checked")


def test_a_tokenizer_without_safe_cuts_gets_the_whole() -> None:
    tokenizer = bpe(pre_tokenizers.Metaspace(prepend_scheme="never"))
    # As Llama 2 does it: a blank in front of every text, so of every piece too.
    blank: list[normalizers.Normalizer] = [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
    ]
    tokenizer.normalizer = normalizers.Sequence(blank)
    text = Text(tokenizer, template=None, specials={})
    (found,) = pieces(text, Document.of(BOOK).blocks(3000), trusted=False)
    assert np.array_equal(found, text.encode(BOOK, trusted=False))


def test_documents_are_read_as_people_mean_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffeins\r\nzwei — drei".encode())
    document = Document.open(path)
    assert document.share() == 0
    assert "".join(document.blocks(4)) == "eins\nzwei — drei"
    assert document.share() == 1
    piped = Document(io.BytesIO(b"x"), name="standard input", size=None)
    assert list(piped.blocks()) == ["x"]
    assert piped.share() is None


@pytest.mark.parametrize(
    ("data", "words"), [(b"caf\xe9 au lait", "not UTF-8"), (b"cut \xe6\x9d", "not UTF-8")]
)
def test_documents_that_are_not_text_are_refused(data: bytes, words: str) -> None:
    document = Document(io.BytesIO(data), name="a.txt", size=len(data))
    with pytest.raises(PotexportError, match=f"a.txt is {words}"):
        list(document.blocks())


def test_prompts_that_are_not_unicode_are_refused() -> None:
    with pytest.raises(PotexportError, match="not valid Unicode"):
        Document.of("a\udcff")


def test_a_frame_without_template_is_the_tokenizers_own_beginning() -> None:
    tokenizer = bpe(SPLITTERS["gpt2"])
    plain = frame(
        Text(tokenizer, template=None, specials={"bos_token": "<s>"}),
        question=None,
        system=None,
        raw=False,
    )
    assert (plain.head.size, plain.tail.size, plain.trusted) == (0, 0, True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = Text(tokenizer, template="{{ messages }}", specials={"bos_token": "<s>"})
    opened = frame(text, question="Who?", system=None, raw=True)
    assert opened.head.tolist() == [0]
    assert opened.tail.tolist() == text.encode("\n\nWho?").tolist()
    with pytest.raises(PotexportError, match="--system"):
        frame(text, question=None, system="Be brief.", raw=True)


def test_a_question_and_a_system_prompt_are_letters() -> None:
    """What is typed beside a document is no more the template's than what stands in it."""
    text = Text(bpe(SPLITTERS["gpt2"]), template=CHATML, specials={})
    name = "<s>"
    control = text.token_id(name)
    assert name in text.controls.names
    plain = reading.frame(text, question="Why?", system="Be brief.", raw=False)
    typed = reading.frame(text, question=f"Why{name}?", system=f"Be{name} brief.", raw=False)
    for one, other in ((plain.head, typed.head), (plain.tail, typed.tail)):
        assert (other == control).sum() == (one == control).sum()
        assert other.size > one.size
    assert text.decode(typed.tail).count(name) == 1
