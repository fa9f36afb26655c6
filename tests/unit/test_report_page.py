"""The page: nothing that a stranger wrote is markup, what is measured stands in it, mistakes are
one line."""

from __future__ import annotations

import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.reporting import evals, page, tables
from potexport.reporting.ledger import Ledger
from potexport.reporting.svg import tag, ticks
from potexport.reporting.trace import Asked, Chunk, Told, Trace
from potexport.runtime.reading import Document
from potexport.spec import Layout

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--"
FACTS = ModelFacts("llama", 2, 4, 2, 8, 100, 512)
POT = PotGeometry(64, 8, 32, 48, 8, 2, 4, positions=200)


def manifest(**changes: Any) -> Manifest:
    given: dict[str, Any] = {
        "model": FACTS,
        "pot": POT,
        "policies": (PolicyFacts("keydiff", "keydiff", ("keys",), {}),),
        "precision": "fp32",
        "target": "cpu",
        "runtime": "onnxruntime",
        "catalyst": "what matters?",
        "source": "a model",
        "eos_token_ids": (2,),
        "graphs": Layout(FACTS, POT, frozenset({"keys"})).graphs(),
        "weights": "weights.safetensors",
        "tools": {},
    }
    return Manifest(**{**given, **changes})


def trace(words: str = HOSTILE, **changes: Any) -> Trace:
    """Six tokens, of which one compression dropped some."""
    ledger = Ledger([2, 2], 6)
    ledger.compress([np.array([[0, 3], [0, 1]], np.int32), np.array([[0, 3], [1, 3]])], 4)
    asked = Asked(Document(io.BytesIO(), name=words, size=0), words, True, 100, 8)
    chunks = (Chunk(4, 0.5, 0.0, 10**9), Chunk(6, 0.5, 0.1, 10**9))
    given: dict[str, Any] = {
        "name": words,
        "asked": asked,
        "pieces": ("<s>", words, " two", " three", " four", "\n"),
        "head": 1,
        "tail": 1,
        "marked": (False, True, False, False, False, False),
        "told": (Told(words, ledger.lives(), chunks, words),),
        "token_bytes": 1024.0,
        "pot_bytes": 65536,
    }
    return Trace(**{**given, **changes})


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def needle(policy: str, exact: float, *, question: str = "unknown") -> dict[str, Any]:
    same = policy != "catalyst"
    cells = [{"depth": 0.25, "width": 0.5, "count": 4, "exact": exact, "digit": 0.5, "nats": 1.0}]
    figures = {name: estimate(exact) for name in ("exact", "digit", "nats")}
    row = {"policy": policy, "question": question, "same_either_way": same, "length": 1024}
    return {**row, **figures, "held": 32, "cells": cells}


def measured(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What eval writes, as far as the page reads it."""
    found: dict[str, Any] = {
        "format": 1,
        "kind": "potexport-eval",
        "model": {"source": "a model", **FACTS.__dict__},
        "pot": {**POT.__dict__, "layer_slots": [], "bytes": 1},
        "policies": [{"label": "keydiff", "needs": ["keys"], "catalyst": "what matters?"}],
        "untouched": None,
        "text": {"name": "novel.txt", "sha256": "0"},
        "seed": 0,
        "protocol": {"needle": "four a document"},
        "notes": ["full is missing: give --model"],
        "tasks": {"needle": {"unit": "digit", "documents": 8, "questions": 32, "rows": rows}},
        "costs": {
            "keydiff": {"tokens": 90, "read_seconds": 2.0, "compress_seconds": 1.0, "share": 0.333}
        },
    }
    return {**found, **changes}


def read(folder: Path, document: object, bundle: Manifest | None = None) -> evals.Measured:
    path = folder / "eval.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return evals.read(path, bundle or manifest())


class Elements(HTMLParser):
    """What a browser would make elements of, and the text of each span of the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_what_a_stranger_wrote_is_never_markup(tmp_path: Path) -> None:
    """A hostile text, question, answer, file name, label, note and figure; no element is theirs."""
    hostile = measured(
        needle(HOSTILE, 0.5),
        notes=[HOSTILE],
        protocol={HOSTILE: HOSTILE},
        text={"name": HOSTILE},
        command=HOSTILE,
        policies=[{"label": HOSTILE, "needs": ["mass"], "catalyst": HOSTILE}],
    )
    bundle = manifest(source=HOSTILE, policies=(PolicyFacts(HOSTILE, "x", (), {}),))
    html = page.render(HOSTILE, bundle, [read(tmp_path, hostile, bundle)], trace())
    elements = Elements(html).found
    names = [name for name, _ in elements]
    assert "img" not in names
    assert names.count("script") == 2
    assert not [key for _, given in elements for key in given if key.startswith("on")]
    assert "<!--" not in html
    assert html.count("</script>") == 2
    assert html.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;") > 10


def test_the_page_loads_nothing_and_runs_only_its_own_script() -> None:
    html = page.render("b", manifest(), [], trace("a <word>"))
    elements = Elements(html).found
    assert not [given for _, given in elements if "src" in given or "style" in given]
    assert all(given["href"] in ("#costs", "#text") for name, given in elements if name == "a")
    assert not re.search(r"https?://|url\(|@import", html)
    rules = next(
        str(given["content"])
        for name, given in elements
        if name == "meta" and given.get("http-equiv") == "Content-Security-Policy"
    )
    assert rules.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in rules


def test_the_text_stands_in_the_page_without_its_script() -> None:
    """At the end: the first token in 3 of 4 heads, the second in 2, the third in none; the last two
    came after the compression."""
    html = page.render("b", manifest(), [], trace("word"))
    spans = re.findall(r'<span class="(c[0-9]+[ mf]*)">(.*?)</span>', html, re.DOTALL)
    assert spans[-6:] == [
        ("c9 f", "&lt;s&gt;"),
        ("c8 m", "word"),
        ("c0", " two"),
        ("c9", " three"),
        ("c10", " four"),
        ("c10 f", "\n"),
    ]


def test_the_question_is_said_to_be_known_or_not(tmp_path: Path) -> None:
    known = trace("word")
    blind = Asked(known.asked.document, "word", False, 100, 8)
    nothing = Asked(known.asked.document, None, True, 100, 8)
    for asked, said in (
        (known.asked, "known while reading"),
        (blind, "unknown while reading"),
        (nothing, "none is known while reading"),
    ):
        assert said in page.render("b", manifest(), [], trace("word", asked=asked))
    both = measured(needle("catalyst", 0.1), needle("catalyst", 0.9, question="known"))
    html = page.render("b", manifest(), [read(tmp_path, both)], None)
    assert "Question unknown while reading" in html
    assert "Question known while reading: it scores the pot" in html
    assert "<script" not in html  # nothing moves without a text


def test_what_bounds_the_policies_is_always_shown(tmp_path: Path) -> None:
    rows = [needle("streaming", 0.2), needle("keydiff", 0.6), needle("oracle", 0.9)]
    (task,) = read(tmp_path, measured(*rows, needle("random", 0.1))).tasks
    table = tables.table(task, "unknown")
    names = [[line.policy for line in group] for group in table.groups]
    assert names == [
        ["full cache", "oracle"],
        ["keydiff", "streaming"],
        ["random", "truncation"],
    ]
    missing = [line.policy for g in table.groups for line in g if line.cells == [None]]
    assert missing == ["full cache", "truncation"]
    html = page.render("b", manifest(), [read(tmp_path, measured(*rows))], None)
    assert html.count("not measured</span>") == 3
    assert "full is missing: give --model" in html
    assert "keydiff, 1,024: exact 0.60 (0.50 to 0.70)" in html
    assert "keydiff, 1,024 tokens, depth 25%: 0.60 exact, 4 needles" in html
    assert "30</td><td>33.3%" in html  # 90 tokens in 3 seconds


def test_another_number_of_kept_slots_is_no_other_pot(tmp_path: Path) -> None:
    pot = {**POT.__dict__, "layer_slots": [], "keep": 20}
    html = page.render("b", manifest(), [read(tmp_path, measured(pot=pot))], None)
    assert "<dt>kept by a compression</dt><dd>20 slots</dd>" in html


def test_what_does_not_depend_on_the_question_is_mapped_once(tmp_path: Path) -> None:
    rows = [
        needle(policy, 0.5, question=question)
        for policy in ("catalyst", "keydiff")
        for question in ("unknown", "known")
    ]
    (task,) = read(tmp_path, measured(*rows)).tasks
    first, second = (tables.table(task, question) for question in task.questions)
    assert [map.policy for map in first.maps] == ["catalyst", "keydiff"]
    assert [map.policy for map in second.maps] == ["catalyst"]
    assert second.elsewhere
    assert not first.elsewhere
    asks = {line.policy: line.asks for line in second.groups[1]}
    assert asks == {"catalyst": "question", "keydiff": ""}


def test_less_perplexity_is_better(tmp_path: Path) -> None:
    rows = [
        {"policy": name, "question": "unknown", "same_either_way": True, "length": 1024,
         "perplexity": {"value": value, "low": value - 1, "high": value + 1}}
        for name, value in (("keydiff", 36.0), ("snapkv", 34.0))
    ]  # fmt: skip
    found = read(tmp_path, measured(tasks={"perplexity": {"rows": rows}}))
    table = tables.table(found.tasks[0], "unknown")
    assert [line.policy for line in table.groups[1]] == ["snapkv", "keydiff"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "is not JSON, or cut short"),
        ("[" * 100_000, "is not JSON, or cut short"),
        ("[]", "was not made by potexport eval"),
        ({"kind": "potexport-parity"}, "was not made by potexport eval"),
        (measured(format=2), "has format 2; this potexport reads 1"),
        (measured(tasks={"needle": {}}), "is not a complete measurement (KeyError: 'rows')"),
        (measured(needle("a", 0.5, question="perhaps")), "question is 'perhaps'"),
        (measured({**needle("a", 0.5), "exact": estimate(float("nan"))}), "a figure is nan"),
        (measured(pot=None), "is not a complete measurement"),
        (measured(costs=[]), "is not a complete measurement"),
        (
            measured(pot={**POT.__dict__, "layer_slots": [], "slots": 512}),
            "was measured with another pot (slots 512; the bundle has 64)",
        ),
        (
            measured(model={"source": "m", **FACTS.__dict__, "layers": 30}),
            "was measured with another model (layers 30; the bundle has 2)",
        ),
    ],
)
def test_a_wrong_measurement_is_refused_by_name(
    tmp_path: Path, document: object, words: str
) -> None:
    with pytest.raises(PotexportError) as refused:
        read(tmp_path, document)
    assert str(refused.value).startswith(str(tmp_path / "eval.json"))
    assert words in str(refused.value)


def test_a_missing_measurement_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PotexportError, match=r"none\.json cannot be read: No such file"):
        evals.read(tmp_path / "none.json", manifest())


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        page.write(path, "half \ud800")
    assert path.read_text() == "old"
    assert page.write(path, "“new”") == len("“new”".encode())
    assert path.read_text(encoding="utf-8") == "“new”"
    assert list(tmp_path.iterdir()) == [path]


def test_elements_are_escaped_and_short() -> None:
    drawn = tag("text", "<&>", x=1.0, y=0.3333, class_='a"b', text_anchor="end")
    assert drawn == '<text x="1" y="0.33" class="a&#34;b" text-anchor="end">&lt;&amp;&gt;</text>'
    assert tag("g", tag("title", "a")) == "<g><title>a</title></g>"


@pytest.mark.parametrize(
    ("high", "expected"),
    [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (370, [0, 100, 200, 300, 400]), (0, [0])],
)
def test_axes_have_round_numbers(high: float, expected: list[float]) -> None:
    assert ticks(high) == expected


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * each for each in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_everything_can_be_read_and_the_scale_holds_without_colours(theme: int) -> None:
    """WCAG's 4.5 for text; the scale is monotonous in luminance, so that no hue is needed."""
    style = (Path(page.__file__).parent / "style.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colours = dict(re.findall(r"--(\w+): #(\w+);", block))
    for level in range(1, 11):
        assert contrast(colours[f"c{level}"], colours[f"t{level}"]) >= 4.5, level
    for name in ("ink", "soft", "accent", "warm", "gone"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    assert contrast(colours["unread"], colours["page"]) >= 3
    scale = [luminance(colours["page"]), *(luminance(colours[f"c{i}"]) for i in range(1, 11))]
    steps = [after / before for before, after in itertools.pairwise(scale)]
    assert all(step > 1 for step in steps) or all(step < 1 for step in steps)
