"""What of a conversation is new, by the templates of several families.

The oracle is transformers' own `apply_chat_template`, down to the ids.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from potexport.errors import PotexportError
from potexport.runtime import conversation, metering
from potexport.runtime.conversation import following, opening
from potexport.runtime.said import Said, plain_messages
from potexport.runtime.text import Text
from tests.unit.chats import CHATML, FAMILIES, SPECIALS, family, with_template

NO_SYSTEM = ("gemma",)
THOUGHT = "<think>\nThey want one word.\n</think>\n\nNot"


@cache
def text_of(name: str) -> Text:
    tokenizer, template = family(name)
    return Text(tokenizer, template=template, specials=SPECIALS)


@cache
def theirs_of(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizer, template = family(name)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)
    made.chat_template = template
    return made


def theirs(name: str, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    found = theirs_of(name).apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **variables
    )
    return list(found)


def turns(name: str, *contents: str, system: str = " Be brief. ") -> list[dict[str, str]]:
    """A conversation of the family's shape: a system prompt if it has any, then by turns."""
    roles = ("user", "assistant")
    made = [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)]
    return made if name in NO_SYSTEM else [{"role": "system", "content": system}, *made]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(contents=st.lists(st.text(), min_size=3, max_size=3))
def test_a_conversation_has_the_ids_that_transformers_gives_it(
    name: str, contents: list[str]
) -> None:
    text = text_of(name)
    assume(not any(each in "\0".join(contents) for each in text.controls.names))
    for messages in (turns(name, contents[0]), turns(name, *contents)):
        assert opening(text, messages, {})[0].tolist() == theirs(name, messages)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("answer", ["A clock.", " A clock \n", THOUGHT, ""])
def test_what_follows_an_answer_is_what_the_template_puts_there(name: str, answer: str) -> None:
    """Whole conversations end with it, and what is before it ends with the answer."""
    text = text_of(name)
    messages = turns(name, "What strikes? ", answer, " And who?")
    rest = following(text, messages, len(messages) - 2, {})
    assert rest is not None
    whole = theirs(name, messages)
    assert whole[len(whole) - rest.size :] == rest.tolist()
    before = text.decode(whole[: len(whole) - rest.size])
    assert before.rstrip().endswith(answer.rpartition("\n\n")[2].strip())
    assert "What strikes?" in before
    assert "And who?" in text.decode(rest)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_nobody_writes_control_tokens_but_the_template(name: str, data: st.DataObject) -> None:
    """However their names are typed, and wherever: the same control tokens as with plain words, and
    not a letter is lost."""
    text = text_of(name)
    typed = st.sampled_from([*sorted(text.controls.names), "x", " ", "\n", "<", "|>", "é"])
    words = ["w" + "".join(data.draw(st.lists(typed, max_size=4))) + "w" for _ in range(4)]
    plain, hostile = (turns(name, *some[1:], system=some[0]) for some in (["w"] * 4, words))
    count = len(plain) - 2
    pairs = [[opening(text, each, {})[0] for each in (plain, hostile)]]
    follows = [following(text, each, count, {}) for each in (plain, hostile)]
    pairs.append([each for each in follows if each is not None])
    for expected, found in pairs:
        controls = [[i for i in ids if i in text.special_ids] for ids in (expected, found)]
        assert controls[0] == controls[1]
    whole = text.decode(pairs[0][1])
    assert all(word in whole for word in (words if name not in NO_SYSTEM else words[1:]))


def test_a_role_cannot_write_control_tokens_either() -> None:
    text = text_of("chatml")
    messages = [{"role": "user<|im_end|>", "content": "a"}]
    ids = opening(text, messages, {})[0].tolist()
    assert ids.count(text.token_id("<|im_end|>")) == 1


def test_bos_is_a_control_token_though_it_is_not_marked_special() -> None:
    tokenizer, template = family("gemma")
    tokenizer.add_tokens(["<eos>"])
    text = Text(tokenizer, template=template, specials={**SPECIALS, "eos_token": "<eos>"})
    eos = text.token_id("<eos>")
    assert eos not in opening(text, turns("gemma", "a<eos>"), {})[0]
    assert eos not in text.encode("a<eos>", trusted=False)
    assert eos in text.encode("a<eos>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_puts_blanks_before_words(scheme: str) -> None:
    """SentencePiece's way, where what follows an answer must not begin as a text does."""
    transformers = pytest.importorskip("transformers")
    pieces = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", "[INST]", "[/INST]"])}
    letters = "abcdefghijklmnopqrstuvwxyzABCW.?\n/[]<>"
    pieces |= {letter: len(pieces) + n for n, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    template = FAMILIES["mistral"][0]
    text = Text(tokenizer, template=template, specials=SPECIALS)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)
    messages = turns("mistral", "What strikes?", "A clock.", "Who?")
    expected = whole.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False
    )
    assert opening(text, messages, {})[0].tolist() == expected
    rest = following(text, messages, 2, {})
    assert rest is not None
    assert expected[-rest.size :] == rest.tolist()
    assert rest[0] == text.token_id("</s>")


def test_what_stands_before_the_first_message_is_told() -> None:
    text = text_of("chatml")
    for content in ("Hello.", "  Hello <|im_end|>. "):
        ids, first = opening(text, turns("chatml", content), {})
        assert text.decode(ids[:first]).startswith("system\n Be brief. \nuser\n")
        assert "Hello" not in text.decode(ids[:first])
        assert text.decode(ids[first:]).lstrip().startswith("Hello")
    for messages in (turns("gemma", "Hi"), turns("chatml", "Hi")[:1], turns("chatml", " ")):
        assert opening(text, messages, {})[1] == 0


def test_thinking_is_forbidden_by_a_variable() -> None:
    text = text_of("qwen3")
    messages = turns("qwen3", "Who?")
    off = {"enable_thinking": False}
    assert opening(text, messages, off)[0].tolist() == theirs("qwen3", messages, **off)
    tool = [*turns("qwen3", "Who?", THOUGHT), {"role": "tool", "content": "Rex"}]
    rest = following(text, tool, 2, {})
    assert rest is not None
    whole = theirs("qwen3", tool)
    assert whole[-rest.size :] == rest.tolist()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",  # the answer is not shown
        "{% for m in messages %}{{ m.content[:9] }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_hides_where_the_answer_ends(template: str) -> None:
    assert following(with_template(template), turns("gemma", "a", "b", "c"), 1, {}) is None


def test_a_template_that_alters_what_is_typed_is_refused() -> None:
    text = with_template(CHATML.replace("message['content']", "message['content'] | upper"))
    assert opening(text, turns("gemma", "a < b"), {})[0].size
    with pytest.raises(PotexportError, match="alters a placeholder"):
        opening(text, turns("gemma", "a <s> b"), {})


def test_contents_are_texts() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    calls = [{"function": {"name": "f", "arguments": {}}}]
    made = plain_messages(
        [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": "x"},
        ]
    )
    assert made == [
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
    ]
    assert plain_messages(made) == made


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "a chat needs a list of messages"),
        ("hi", "a chat needs a list of messages"),
        ({"role": "user", "content": "hi"}, "a chat needs a list of messages"),
        (["hi"], "a chat's message is 'hi'; expected a role"),
        ([{"content": "hi"}], "expected a role and a content"),
        ([{"role": 1, "content": "hi"}], "expected a role and a content"),
        ([{"role": "user"}], "the content of a message of the role user is None; expected text"),
        ([{"role": "user", "content": 3}], "is 3; expected text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has the type 'image_url'; only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only parts of the type 'text'"),
        ([{"role": "user", "content": "a", "x": object()}], "plain JSON data"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, says: str) -> None:
    with pytest.raises(PotexportError, match=says):
        plain_messages(messages)


def test_what_goes_on() -> None:
    first = {"role": "user", "content": "Hi"}
    said = Said((first,), {}, " Hello. \n", 9)
    answer, more = {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"}
    assert said.all == [first, {"role": "assistant", "content": " Hello. \n"}]
    assert said.goes_on([first, answer, more], {})
    assert said.goes_on([first, {**answer, "refusal": ""}, more], {})
    assert not said.goes_on([first], {})
    assert not said.goes_on([first, {**answer, "content": "Hello"}, more], {})
    assert not said.goes_on([first, more, answer], {})
    assert not said.goes_on([{**first, "name": "Ann"}, answer, more], {})
    assert not said.goes_on([first, answer, more], {"enable_thinking": False})
    assert Said.from_bytes(said.to_bytes()) == said


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(PotexportError, match="not valid Unicode"):
        opening(text_of("chatml"), turns("gemma", "a\ud800b"), {})


def test_ids_are_int32() -> None:
    ids, _ = opening(text_of("chatml"), turns("gemma", "a"), {})
    assert ids.dtype == np.int32


def test_a_book_in_a_message_is_no_work_for_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may make so many characters and no more; the ids are the same."""
    book = "  " + "A line with <|im_end|> in it.\n" * 8000
    messages = plain_messages(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": book}]
    )
    found, pinned = opening(text_of("chatml"), messages, {})
    monkeypatch.setattr(metering, "MAX_CHARS", 50_000)
    again, same = opening(text_of("chatml"), messages, {})
    assert np.array_equal(found, again)
    assert pinned == same > 0
    later = [messages[0], *plain_messages([{"role": "user", "content": "Read this."}])]
    later += plain_messages([{"role": "assistant", "content": "What?"}, messages[1]])
    rest = following(text_of("chatml"), later, 2, {})
    assert rest is not None
    assert rest.size > 0.9 * (found.size - pinned)
    monkeypatch.setattr(conversation, "LONG", len(book))
    with pytest.raises(PotexportError, match="made more than"):
        opening(text_of("chatml"), messages, {})


def test_only_an_answer_may_have_calls_in_place_of_a_content() -> None:
    call = {"role": "system", "tool_calls": [1]}
    data = Said((), {}, "", 1).to_bytes().replace(b'"messages": []', b'"messages": [%b]')
    with pytest.raises(PotexportError, match="the content of a message"):
        Said.from_bytes(data.replace(b"%b", json.dumps(call).encode()))
    assert plain_messages([{**call, "role": "assistant"}])
