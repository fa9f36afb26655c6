"""Conversations: `Session.chat` as an application's author uses it.

The other side of each comparison feeds what transformers' `apply_chat_template` gives, by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from potexport.errors import PotexportError
from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session
from tests.unit.chats import GEMMA, with_template

QUESTIONS = ("Who is Rex?", "And the fox?", "Which year was it, and why?", "Go on.", "Hm?", "So?")
MARK = "§"  # in place of an answer


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Session:
    return Session.open(bundle, threads=1)


@pytest.fixture
def session(opened: Session) -> Session:
    opened.reset()
    return opened.fork()


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def texts(tokens: Sequence[Any] | Iterator[Any]) -> str:
    return "".join(token.text for token in tokens)


class ByHand:
    """A session that is fed ids, turn by turn."""

    def __init__(self, session: Session, tokenizer: Any) -> None:
        self.session, self._tokenizer = session, tokenizer
        self.read = 0

    def answer(self, messages: list[dict[str, str]], limit: int) -> list[int]:
        """Feed what the template puts behind the last answer, and take the likeliest tokens."""
        marked = [m if m["role"] != "assistant" else {**m, "content": MARK} for m in messages]
        ids = self._tokenizer.apply_chat_template(
            marked, add_generation_prompt=True, return_dict=False
        )
        if len(messages) > 2:
            mark = self._tokenizer.encode(MARK, add_special_tokens=False)
            found = [n for n in range(len(ids)) if ids[n : n + len(mark)] == mark]
            ids = ids[found[-1] + len(mark) :]
        self.session.set_catalyst(messages[-1]["content"])
        self.session.feed(ids, to_come=limit)
        self.read += len(ids)
        tokens = []
        for _ in range(limit):
            tokens.append(int(self.session.logits().argmax()))
            if tokens[-1] in self.session.manifest.eos_token_ids:
                break  # the template writes it
            self.session.accept(tokens[-1])
        return tokens


def test_a_conversation_is_what_feeding_it_by_hand_gives(session: Session, theirs: Any) -> None:
    """Past the pot, with a system prompt, and answers of different lengths."""
    other = ByHand(session.fork(), theirs)
    messages = [{"role": "system", "content": "Speak of sheep and goats."}]
    for number, question in enumerate(QUESTIONS):
        messages.append(user(question))
        limit = 3 + 5 * number
        expected = other.answer(messages, limit)
        tokens = list(session.chat(messages, max_new_tokens=limit))
        assert [token.id for token in tokens] == expected
        messages = session.chat.messages
        assert messages[-1] == {"role": "assistant", "content": texts(tokens)}
        assert session.stats.tokens_read + 1 >= other.read  # nothing twice; the last one waits
    assert session.stats.compressions == other.session.stats.compressions > 5
    assert session.length == other.read + session.stats.tokens_generated


def test_a_conversation_that_fits_is_one_prompt(session: Session, theirs: Any) -> None:
    """The whole of it at once, and its answer, are the last question and its answer."""
    messages = [user("Q")]
    first = [token.id for token in session.chat(messages, max_new_tokens=3)]
    messages = [*session.chat.messages, user("R")]
    second = [token.id for token in session.chat(messages, max_new_tokens=3)]
    assert session.stats.compressions == 0
    messages[1]["content"] = MARK
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    mark = theirs.encode(MARK, add_special_tokens=False)
    at = next(n for n in range(len(ids)) if ids[n : n + len(mark)] == mark)
    session.reset()
    session.feed([*ids[:at], *first, *ids[at + len(mark) :]])
    assert [token.id for token in session.generate(max_new_tokens=3)] == second


def ended(session: Session, messages: list[dict[str, str]]) -> list[int]:
    """An answer that comes to its end."""
    session.chat(messages)
    start = session.snapshot()
    for seed in range(1000):
        session.restore(start)
        sampling = Sampling(temperature=50.0, seed=seed)
        tokens = [
            token.id for token in session.chat(messages, max_new_tokens=12, sampling=sampling)
        ]
        if tokens[-1] in session.manifest.eos_token_ids:
            return tokens
    raise AssertionError("no answer ends")


@pytest.mark.parametrize("same", [True, False], ids=["the template's", "another"])
def test_an_end_token_is_read_once(session: Session, theirs: Any, same: bool) -> None:
    """The model's end token and the template's are one, whichever the model ended with."""
    if not same:
        session.manifest = replace(session.manifest, eos_token_ids=(7,))
    messages = [user("Q")]
    tokens = ended(session, messages)
    assert (tokens[-1] == theirs.eos_token_id) is same
    messages = [*session.chat.messages, user("R")]
    answer = [token.id for token in session.chat(messages, max_new_tokens=5)]
    messages[1]["content"] = MARK
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    mark = theirs.encode(MARK, add_special_tokens=False)
    at = next(n for n in range(len(ids)) if ids[n : n + len(mark)] == mark)
    assert session.length == len(ids) - len(mark) + len(tokens) - 1 + len(answer)
    other = session.fork()
    other.reset()
    other.set_catalyst("Q")
    other.feed(ids[:at], to_come=12)
    for token in tokens[:-1]:
        other.logits()
        other.accept(token)
    other.logits()
    other.set_catalyst("R")
    other.feed(ids[at + len(mark) :], to_come=5)
    assert [token.id for token in other.generate(max_new_tokens=5)] == answer


def test_an_answer_that_is_left_is_ended_by_the_next_turn(session: Session) -> None:
    """Closed, stopped by a string, never begun, or cut within a character."""
    stream = session.chat([user("Who?")], max_new_tokens=9)
    shown = texts([next(stream) for _ in range(4)])
    stream.close()  # type: ignore[attr-defined]
    assert session.chat.messages[-1]["content"] == shown
    ids = session.length
    messages = [*session.chat.messages, user("What?")]
    session.chat(messages)  # never begun
    between = session.text.encode(
        "<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert session.length == ids + between.size
    assert session.chat.messages[-1]["content"] == ""
    messages = [*session.chat.messages, user("What?")]
    assert session.chat.continues(messages)
    whole = texts(session.fork().chat(messages, max_new_tokens=20))
    before = session.stats.tokens_generated
    word = whole[5:7]
    cut = texts(session.chat(messages, max_new_tokens=20, stop=[word]))
    assert cut == whole[: whole.index(word)]
    assert session.chat.messages[-1]["content"] == cut
    assert session.stats.tokens_generated > before
    assert session.chat.continues([*session.chat.messages, user("x")])


def test_other_messages_begin_anew(session: Session) -> None:
    first = list(session.chat([user("Who?")], max_new_tokens=5))
    others: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        ([user("What?")], {}),  # another conversation
        ([user("Who?")], {}),  # the same question again
        ([*session.chat.messages[:1], user("x")], {}),
        ([*session.chat.messages, user("x")], {"tools": []}),
    ]
    for messages, variables in others:
        state = session.snapshot()
        assert not session.chat.continues(messages, **variables)
        session.chat(messages, **variables)
        assert session.stats.tokens_generated == 0
        assert session.length == session.text.encode(session.text.chat(messages)).size
        session.restore(state)
    assert list(session.chat([user("Who?")], max_new_tokens=5)) == first


def test_what_is_fed_beside_a_conversation_ends_it(session: Session) -> None:
    texts(session.chat([user("Who?")], max_new_tokens=5))
    messages = [*session.chat.messages, user("x")]
    session.feed("A text.")
    assert session.chat.messages == []
    assert not session.chat.continues(messages)


def test_an_older_answer_does_not_go_on_in_a_newer_one(session: Session) -> None:
    stream = session.chat([user("Who?")], max_new_tokens=9)
    next(stream)
    session.chat([user("What?")])
    before = session.chat.messages
    with pytest.raises(PotexportError, match="the session has gone on without this answer"):
        next(stream)
    assert session.chat.messages == before


def test_what_is_refused_changes_nothing(session: Session) -> None:
    texts(session.chat([user("Who?")], max_new_tokens=5))
    messages, before = session.chat.messages, session.stats
    refused: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([user("x"), {"role": "user"}], {}, "expected text"),
        ([user("x")], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([user("x")], {"stop": [""]}, "stop strings are"),
        ([user("x")], {"tools": object()}, "plain JSON data"),
    ]
    for bad, settings, says in refused:
        with pytest.raises(PotexportError, match=says):
            session.chat(bad, **settings)
    session.text = with_template(GEMMA)
    with pytest.raises(PotexportError, match="System role not supported"):
        session.chat([{"role": "system", "content": "x"}, user("x")])
    assert session.chat.messages == messages
    assert session.stats == before


def test_reading_may_be_left_and_goes_on(session: Session, book: str) -> None:
    """As Ctrl-C leaves it: the question stands without an answer, and is read to its end."""

    def leave(read: int, total: int) -> None:
        if read > 100:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session.chat([user(book[:900])], on_progress=leave)
    left = session.stats.tokens_read
    messages = [*session.chat.messages, user("Well?")]
    assert messages[1] == {"role": "assistant", "content": ""}
    answer = texts(session.chat(messages, max_new_tokens=8))
    assert session.stats.tokens_read > left > 100
    assert answer == texts(
        [*chat_of(session, [user(book[:900])], messages)]  # as if nobody had left
    )


def chat_of(session: Session, *conversations: list[dict[str, str]]) -> Iterator[Any]:
    """The last answer of a fork that begins anew; the others are never begun."""
    other = session.fork()
    other.reset()
    for messages in conversations[:-1]:
        other.chat(messages)
    return other.chat(conversations[-1], max_new_tokens=8)


def test_the_last_message_scores_the_pot_unless_somebody_chose(session: Session) -> None:
    width = session.manifest.pot.catalyst_width
    question = "Who is <|im_end|> that walks in the garden?"
    session.chat([user(question)])
    asked = session.text.encode(question, trusted=False)
    assert np.array_equal(session.catalyst, asked[-width:])
    session.set_catalyst("Sum")
    session.chat([user(question)])
    assert np.array_equal(session.catalyst, session.text.encode("Sum"))


def test_a_conversation_is_saved_and_forked(session: Session, bundle: Path, tmp_path: Path) -> None:
    """Nothing is read again, and every answer is the same."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "Speak."}]
    for question in QUESTIONS[:3]:
        messages = [*messages, user(question)]
        texts(session.chat(messages, max_new_tokens=9))
        messages = session.chat.messages
    session.save(tmp_path / "a.pot")
    loaded = Session.open(bundle, threads=1, saved=tmp_path / "a.pot")
    assert loaded.chat.messages == messages
    others = [loaded, session.fork()]
    before = session.stats.tokens_read
    messages.append(user("Well, é?"))
    answer = list(session.chat(messages, max_new_tokens=9))
    for other in others:
        assert list(other.chat(messages, max_new_tokens=9)) == answer
        assert other.stats.tokens_read - before < 60
        assert other.chat.messages == session.chat.messages


def test_an_answer_goes_on_where_it_was_saved(
    session: Session, bundle: Path, tmp_path: Path
) -> None:
    """In its middle, too: compressions of its rest go by the same question."""
    answer = session.chat([user(QUESTIONS[2] * 3)], max_new_tokens=90)
    for _ in range(5):
        next(answer)
    session.save(tmp_path / "a.pot")
    others = [Session.open(bundle, threads=1, saved=tmp_path / "a.pot"), session.fork()]
    kept: list[list[Any]] = [[], [], []]
    for mine, each in zip(kept, (session, *others), strict=True):
        each.on_compress = mine.append
    rest = [token.id for token in answer]
    for other in others:
        assert np.array_equal(other.catalyst, session.catalyst)
        for token in rest:
            assert int(other.logits().argmax()) == token
            other.accept(token)
    assert kept[0]
    for mine in kept[1:]:
        assert all(np.array_equal(*pair) for pair in zip(kept[0], mine, strict=True))
