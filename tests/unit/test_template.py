"""Chat templates: rendered as transformers does, and hostile ones bounded."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.errors import PotexportError
from potexport.runtime import metering
from tests.unit.chats import CHAT, CHATML, LLAMA2, LLAMA3, SPECIALS, trained, with_template


def reference(template: str, messages: list[dict[str, Any]], **extra: Any) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(), **SPECIALS)
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **extra)
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA2, LLAMA3], ids=["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_renders_as_transformers_does(template: str, length: int, prompt: bool) -> None:
    messages = CHAT[: length if length != 1 else 2][-length:]
    expected = reference(template, messages, add_generation_prompt=prompt)
    assert with_template(template).chat(messages, add_generation_prompt=prompt) == expected


def test_chat_passes_tools_and_drops_none_as_transformers_does() -> None:
    tools = [{"type": "function", "function": {"name": "<f>", "description": "é 'q' & \"p\""}}]
    messages = [{"role": "user", "content": "hi", "tool_calls": None}]
    expected = reference(LLAMA3, messages, tools=tools, add_generation_prompt=True)
    assert with_template(LLAMA3).chat(messages, tools=tools) == expected
    bare = "{{ messages[0] | tojson }}"
    assert with_template(bare).chat(messages) == reference(bare, messages)
    assert "<f>" in expected
    assert "é" in expected


def test_a_template_may_refuse_in_its_own_words() -> None:
    with pytest.raises(PotexportError) as caught:
        with_template(LLAMA2).chat([CHAT[2]])
    assert str(caught.value) == (
        "the chat template refused: Conversation roles must alternate user/assistant/user/..."
    )


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metering, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(metering, "MAX_CHARS", 100_000)
    monkeypatch.setattr(metering, "MAX_PARTS", 10_000)
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 5.0


TWICE = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


TREE = "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}"


GROW = (
    "{% set ns = namespace(x=START) %}"
    "{% for i in range(60) %}{% set ns.x = ns.x STEP ns.x %}{% endfor %}"
)


NEST = (
    "{% set ns = namespace(x='x') %}"
    "{% for i in range(60) %}{% set ns.x %}BODY{% endset %}{% endfor %}"
)


KEPT = "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(m(m('x' * 90000) * 2) * 2) }}"


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ (messages|attr('__class__')).mro() }}",
    "class by format": "{{ '{0.__class__}'.format(messages) ~ ''.__class__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "method": "{{ messages.append(1) }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_back }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "builtin": "{{ __import__('os').system('true') }}",
    "namespace call": "{% set ns = namespace() %}{% set ns.__call__ = cycler %}{{ ns(1) }}",
    "namespace keyword": "{{ namespace(__html__=cycler) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% if %}",
    "unclosed": "{% for message in messages %}",
    "nesting": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "wrong type": "{{ 1 + 'x' }}",
    "unknown": "{{ messages[0].nothing.nothing }}",
    "zero": "{{ 1 // 0 }}",
    "unknown filter": "{{ 1|no_such_filter }}",
    "long words": "{{ raise_exception('\x1b[2J\n' ~ 'x' * 5000) }}",
}


BOMBS = {
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    TWICE.replace("BODY", "x" * 100): "made more than",
    TWICE.replace("BODY", ""): "ran for more than",
    TREE: "ran for more than",
    "{{ 'x' * 10**10 }}": "made more than",
    "{{ 10**10 * 'x' }}": "made more than",
    "{{ [1] * 10**10 }}": "made more than",
    "{{ 10 ** (10 ** 10) }}": "made more than",
    "{{ ((7**9999)**9999)**9999 }}": "made more than",
    GROW.replace("START", "'x'").replace("STEP", "~"): "made more than",
    GROW.replace("START", "'x'").replace("STEP", "+"): "made more than",
    GROW.replace("START", "9").replace("STEP", "*"): "made more than",
    "{{ 'x'.ljust(10**10) }}": "asked for a width",
    "{{ 'x'|center(10**10) }}": "asked for a width",
    "{{ messages|tojson(indent=10**10) }}": "asked for a width",
    # One operation that prints, fills in or searches what took many to make.
    GROW.replace("START", "[1]").replace("ns.x STEP ns.x", "[ns.x, ns.x]"): "list of more than",
    GROW.replace("START", "[1]").replace("ns.x STEP ns.x", "{0: ns.x, 1: ns.x}"): "list of more",
    GROW.replace("START", "(1,)").replace("ns.x STEP ns.x", "(ns.x, ns.x)"): "list of more than",
    GROW.replace("START", "1").replace("ns.x STEP ns.x", "dict(a=ns.x, b=ns.x)"): "list of more",
    GROW.replace("START", "1").replace("ns.x STEP ns.x", "[0]|batch(3, ns.x)|list"): "list of more",
    NEST.replace("BODY", "{{ ns.x }}{{ ns.x }}"): "made more than",
    KEPT: "made more than",
    "{{ '%10000000000d' % 1 }}": "asked for a width",
    "{{ '%*d' % (10**10, 1) }}": "asked for a width",
    "{{ '{:10000000000}'.format(1) }}": "asked for a width",
    "{{ '{:{}}'.format(1, 10**10) }}": "asked for a width",
    "{{ '{:>{}}'.format('a', '9999999999') }}": "asked for a width",
    "{{ '{0:>{1[w]}}'.format('a', {'w': 9999999999}) }}": "asked for a width",
    "{{ '{x:>{w}}'.format_map({'x': 'a', 'w': '9999999999'}) }}": "asked for a width",
    "{{ strftime_now('%1500000000d') }}": "asked for a width",
    "{{ strftime_now('%_^099999Y') }}": "asked for a width",
    "{{ strftime_now('%c' * 9999) }}": "asked for a date",
    "{{ ('%s' * 1000) % ((('x' * 10000),) * 1000) }}": "made more than",
    "{{ ('%(a)s' * 1000) % {'a': 'x' * 10000} }}": "made more than",
    "{{ ('{0}' * 1000).format('x' * 10000) }}": "made more than",
    "{{ ('%(a)s' * 1000)|format(a='x' * 10000) }}": "made more than",
    "{{ ('a' * 1000).replace('a', 'x' * 10000) }}": "made more than",
    "{{ ('a' * 1000)|replace('a', 'x' * 10000) }}": "made more than",
    "{{ ('x' * 10000).join(['a'] * 1000) }}": "made more than",
    "{{ (['a'] * 1000)|join('x' * 10000) }}": "made more than",
    "{{ range(9999)|map('center', 99999)|list|length }}": "made more than",
    "{{ range(9999)|map('string')|join('x' * 10000) }}": "made more than",
    "{{ ('\n' * 10000)|indent(90000) }}": "made more than",
    "{{ ('\t' * 10000).expandtabs(90000) }}": "made more than",
    "{% set x = 'x' * 90000 %}" + "{% set y = x[1:] %}" * 50: "characters in all",
    "{% set x = range(9999)|list %}{{ x|select('in', x|reverse|list)|list }}": "ran for more",
    "{% set x = range(9999)|list %}{% for i in x if i + 9999 in x %}{% endfor %}": "ran for more",
    "{{ 'x'.encode().ljust(10**9) }}": "is unsafe",
    "{{ (1).to_bytes(10**9, 'big') }}": "is unsafe",
}


def refusal(template: str) -> str:
    with pytest.raises(PotexportError) as caught:
        with_template(template).chat(CHAT)
    message = str(caught.value)
    assert message.startswith("the chat template ")
    assert message.isprintable()
    assert len(message) < 400
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name: str) -> None:
    refusal(HOSTILE[name])


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("template", BOMBS)
def test_bombs_are_stopped_by_their_limit(template: str) -> None:
    assert BOMBS[template] in refusal(template)


def test_a_broken_template_names_its_line_and_stops_nothing_else() -> None:
    text = with_template("fine\n{% if %}")
    assert text.decode(text.encode("fox")) == "fox"
    with pytest.raises(PotexportError, match="broken at line 2"):
        text.chat(CHAT)


def test_only_plain_data_reaches_a_template() -> None:
    text = with_template("{{ messages[0].content.unlink() }}")
    with pytest.raises(PotexportError, match="plain JSON data"):
        text.chat([{"role": "user", "content": Path("/nowhere")}])


def test_messages_must_be_messages() -> None:
    with pytest.raises(PotexportError, match="a chat's message is 'hi'; expected a role"):
        with_template(CHATML).chat(["hi"])  # type: ignore[list-item]


def test_a_message_cannot_act_on_the_template() -> None:
    content = "{{ 1 + 1 }}{% endfor %}"
    assert content in with_template(CHATML).chat([{"role": "user", "content": content}])


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@settings(max_examples=25, deadline=None)
@given(document=st.text(), before=st.text(), after=st.text())
def test_head_document_tail_is_the_whole_chat(
    template: str, system: str | None, document: str, before: str, after: str
) -> None:
    text = with_template(template)
    # Solid letters at the edges: what a template strips there is the next test's matter.
    before, after = f"Read: {before}", f"{after} What is it?"
    head, tail = text.frame(system, before, after)
    messages = [{"role": "system", "content": system}] if system is not None else []
    whole = text.chat([*messages, {"role": "user", "content": before + document + after}])
    assert head + document + tail == whole


def test_a_stripping_template_strips_what_is_around_the_document_only() -> None:
    head, tail = with_template(LLAMA2).frame(None, "  Read:\n\n", "\n\nWhat is it?  ")
    assert head == "<s>[INST] Read:\n\n"
    assert tail == "\n\nWhat is it? [/INST]"
    head, tail = with_template(LLAMA2).frame(None, "", "")
    assert (head, tail) == ("<s>[INST] ", " [/INST]")


@pytest.mark.parametrize(
    ("template", "fate"),
    [
        ("{{ messages[0].role }}", "dropped or altered"),
        ("{{ messages[0].content[:20] }}", "dropped or altered"),
        ("{{ messages[0].content|lower }}", "dropped or altered"),
        ("{{ messages[0].content|upper }}", "dropped or altered"),
        ("{{ messages[0].content|title }}", "dropped or altered"),
        ("{{ messages[0].content|capitalize }}", "dropped or altered"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "repeated 2 times"),
    ],
)
def test_a_template_that_loses_the_document_is_refused(template: str, fate: str) -> None:
    with pytest.raises(PotexportError, match=re.escape(fate)):
        with_template(template).frame(None, "", "")


def test_a_frame_takes_the_template_s_own_variables() -> None:
    template = "{{ messages[0].content }}{% if think %}<think>{% endif %}"
    assert with_template(template).frame(None, "a", "b", think=True) == ("a", "b<think>")
