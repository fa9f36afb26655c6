"""Documents of an evaluation: as long as asked, every needle inside, the same for a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from potexport.errors import PotexportError
from potexport.evaluation import needles
from potexport.evaluation.prose import Prose, passages
from potexport.runtime.text import Text
from tests import tiny

NOVEL = Path(__file__).parents[2] / "data" / "pride-and-prejudice.txt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return Text.open(folder)


@pytest.fixture(scope="module")
def pieces() -> Text:
    """As SentencePiece has it: a blank is a letter, put before each text; no template."""
    letters = sorted(set("▁" + "".join(map(chr, range(33, 127)))))
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace()
    return Text(tokenizer, template=None, specials={})


@pytest.fixture(scope="module")
def prose() -> Prose:
    return Prose("novel.txt", "", NOVEL.read_text(encoding="utf-8")[2000:90_000])


@pytest.mark.parametrize("length", [900, 1111])
def test_every_document_is_as_long_as_asked_and_whole(
    text: Text, prose: Prose, length: int
) -> None:
    found = needles.documents(text, prose, length=length, count=4, seed=0)
    bins = set()
    for document in found:
        assert document.ids.size == length
        assert document.ids[: document.head.size].tolist() == document.head.tolist()
        whole = text.decode(document.ids)
        assert {q.kind for q in document.questions} == {kind.name for kind in needles.KINDS}
        for question in document.questions:
            number = text.decode(question.wanted).strip()
            assert len(number) == 5
            assert whole.count(number) == 1
            fact = next(s for s in document.facts.split(". ") if number in s)
            assert fact.rstrip(".") in whole
            before = whole[: whole.index(fact)]
            share = text.encode(before).size / (length - document.head.size)
            assert question.depth == pytest.approx(share, abs=0.01)
            asked = text.decode(question.given)
            assert question.text in asked
            assert number not in asked
            bins.add(int(question.depth * needles.BINS))
    assert len(bins) > needles.BINS // 2  # more than one document has


def test_a_seed_gives_the_same_documents_and_another_gives_others(text: Text, prose: Prose) -> None:
    first, second, other = (
        needles.documents(text, prose, length=500, count=2, seed=seed) for seed in (1, 1, 2)
    )
    for one, two in zip(first, second, strict=True):
        assert np.array_equal(one.ids, two.ids)
        assert [q.wanted.tolist() for q in one.questions] == [
            q.wanted.tolist() for q in two.questions
        ]
    assert not np.array_equal(first[0].ids, other[0].ids)


def test_digits_are_told_from_longer_tokens(text: Text, pieces: Text) -> None:
    kind = needles.KINDS[0]
    words = {"thing": "chapel", "number": "42013"}
    own = needles.question(pieces, kind, words, depth=0.5)
    assert own.digits
    assert own.wanted.size == 5
    assert pieces.decode(own.given).endswith("The secret code of the chapel is ")
    longer = needles.question(text, kind, words, depth=0.5)  # trained on "42" and "13"
    assert not longer.digits
    assert text.decode(longer.wanted).strip() == "42013"


def test_without_a_template_the_answer_begins_on_a_line_of_its_own(
    pieces: Text, prose: Prose
) -> None:
    (document,) = needles.documents(pieces, prose, length=2500, count=1, seed=0)
    assert document.head.size == 0
    assert document.ids.size == 2500


def test_what_is_too_short_is_refused(text: Text, prose: Prose) -> None:
    with pytest.raises(PotexportError, match="too short for 4 needles"):
        needles.documents(text, prose, length=150, count=1, seed=0)
    short = Prose("short.txt", "", "One sentence. And another one.")
    with pytest.raises(PotexportError, match=r"short\.txt has some \d+ tokens"):
        needles.documents(text, short, length=500, count=1, seed=0)


def test_a_text_without_full_stops_has_sentences_too() -> None:
    found = Prose("words.txt", "", "word " * 1000).sentences
    assert len(found) > 10
    assert all(len(each.split()) <= 60 for each in found)


def test_passages_are_prose_as_it_stands(text: Text, prose: Prose) -> None:
    opening = np.array([1], np.int32)
    for ids in passages(text, prose, opening, length=321, count=3, seed=0):
        assert ids.size == 321
        assert ids[0] == 1
        running = " ".join(prose.sentences)
        assert text.decode(ids[1:-3]) in running
