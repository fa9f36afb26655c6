"""`report`: a bundle and a text become a page, which a real browser then steps through."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import zlib
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from potexport import bundle as bundles
from potexport.reporting import maps
from potexport.runtime import reading
from potexport.runtime.reading import Document
from potexport.runtime.session import Session
from tests.browser import FLAGS
from tests.e2e.helpers import Cli, assert_refused

POLICIES = ("infinipot", "keydiff", "streaming")
QUESTION = "Who is it?"


@pytest.fixture(scope="module")
def several(
    cli: Cli, model_folder: Path, pot_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of three policies."""
    folder = tmp_path_factory.mktemp("several") / "three.bundle"
    labels = [text for label in POLICIES for text in ("--policy", label)]
    made = cli("build", model_folder, "-o", folder, *pot_options, *labels)
    assert made.exit_code == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def text(book: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(book[:300] + "</script><script>document.title='owned'</script>é€" + book[300:])
    return path


@pytest.fixture(scope="module")
def page(cli: Cli, several: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    made = cli("report", several, "--text", text, "--question", QUESTION, "--tokens", 700,
               "--max-new-tokens", 8, "--mark", "owned", "-o", path)  # fmt: skip
    assert made.exit_code == 0, made.stderr
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                      page.read_text(encoding="utf-8"))  # fmt: skip
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def spans_of(html: str) -> list[tuple[str, str]]:
    """(classes, text) of each token."""
    inside = html[html.index('<div id="tokens"') : html.index('<aside class="inspect"')]
    found = re.findall(r'<span class="([^"]*)">(.*?)</span>', inside, re.DOTALL)
    return [(classes, unescape(piece)) for classes, piece in found]


class Followed:
    """The same reading by hand: lists of tokens that each head holds, after each compression."""

    def __init__(self, folder: Path, content: str, label: str) -> None:
        self.session = Session.open(folder, policy=label)
        facts = self.session.manifest.model
        self.lists: list[list[int]] = [[] for _ in range(facts.layers * facts.kv_heads)]
        self.read = 0
        self.steps: list[tuple[int, list[list[int]]]] = []
        self.session.set_catalyst(QUESTION)
        self.session.on_compress = self.compressed
        around = reading.frame(self.session.text, question=QUESTION, system=None, raw=False)
        reading.read(self.session, Document.of(content), around, answer=8)
        self.session.logits()
        self.fresh()
        self.steps.append((self.read, [list(each) for each in self.lists]))

    def fresh(self) -> None:
        read = self.session.stats.tokens_read
        for each in self.lists:
            each += range(self.read, read)
        self.read = read
        if not self.steps:  # before any compression
            self.steps.append((read, [list(each) for each in self.lists]))

    def compressed(self, kept: list[Any]) -> None:
        self.fresh()
        rows = [row for layer in kept for row in layer]
        self.lists = [
            [held[slot] for slot in row] for held, row in zip(self.lists, rows, strict=True)
        ]
        self.steps.append((self.read, [list(each) for each in self.lists]))


@pytest.fixture(scope="module")
def followed(several: Path, page: Path) -> dict[str, Followed]:
    """By hand, over the text that the page shows between the template's frame."""
    pieces = spans_of(page.read_text(encoding="utf-8"))
    content = "".join(piece for classes, piece in pieces if "f" not in classes.split())
    return {label: Followed(several, content, label) for label in POLICIES}


def test_the_page_shows_the_text_that_was_read(page: Path, text: Path) -> None:
    pieces = spans_of(page.read_text(encoding="utf-8"))
    shown = "".join(piece for classes, piece in pieces if "f" not in classes.split())
    assert text.read_text().startswith(shown)
    assert "</script><script>document.title='owned'</script>é€" in shown
    marked = "".join(piece for classes, piece in pieces if "m" in classes.split())
    assert "owned" in marked
    assert len(marked) < 12
    framed = "".join(piece for classes, piece in pieces if "f" in classes.split())
    assert framed.startswith("<|im_start|>user")
    assert QUESTION in framed


@pytest.mark.parametrize("label", POLICIES)
def test_what_each_head_holds_is_what_was_kept(
    page: Path, followed: dict[str, Followed], label: str
) -> None:
    data, mine = data_of(page), followed[label]
    policy = next(each for each in data["policies"] if each["label"] == label)
    heads, steps = sum(data["heads"]), mine.steps
    gone = zlib.decompress(base64.b64decode(policy["gone"]))
    assert policy["wide"] == 1
    assert len(gone) == heads * mine.read
    assert policy["read"] == [read for read, _ in steps[1:-1]]
    assert len(policy["read"]) >= 15
    for step, (read, lists) in enumerate(steps):
        for head, held in enumerate(lists):
            lives = [gone[token * heads + head] for token in range(read)]
            assert held == [t for t, when in enumerate(lives) if when == 0 or when > step]


def test_streaming_holds_the_same_in_every_head(page: Path) -> None:
    """And the policies differ: three times the same would prove little."""
    data = data_of(page)
    gone = {
        policy["label"]: zlib.decompress(base64.b64decode(policy["gone"]))
        for policy in data["policies"]
    }
    assert list(gone) == list(POLICIES)
    heads = sum(data["heads"])
    rows = [gone["streaming"][i : i + heads] for i in range(0, len(gone["streaming"]), heads)]
    assert all(len(set(row)) == 1 for row in rows)
    assert len(set(gone.values())) == 3


def test_it_is_told_as_json(cli: Cli, several: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    result = cli("report", several, "--text", text, "--tokens", 200, "--policy", "streaming",
                 "--max-new-tokens", 4, "-o", path, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["bytes"] == path.stat().st_size
    assert 200 < found["tokens"] < 240
    (streaming,) = found["policies"]
    assert streaming["compressions"] > 3
    assert 0 < streaming["held"] <= 48
    assert "none is known while reading" in path.read_text(encoding="utf-8")


def test_a_program_of_executorch_is_traced_alike(
    cli: Cli, model_folder: Path, pot_options: list[str], page: Path, text: Path, tmp_path: Path
) -> None:
    program, path = tmp_path / "program.bundle", tmp_path / "r.html"
    made = cli("build", model_folder, "-o", program, "--runtime", "executorch", *pot_options,
               "--policy", "streaming")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    result = cli("report", program, "--text", text, "--question", QUESTION, "--tokens", 700,
                 "--max-new-tokens", 8, "-o", path)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (mine,), theirs = data_of(path)["policies"], data_of(page)["policies"][-1]
    assert mine == theirs


def test_a_text_that_fits_is_never_compressed(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("A fox.")
    result = cli("report", bundle, "--text", tmp_path / "t.txt", "--max-new-tokens", 4,
                 "-o", tmp_path / "r.html", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["policies"][0]["compressions"] == 0


def measured(folder: Path) -> dict[str, Any]:
    manifest = bundles.read(folder)
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"policy": "keydiff", "question": "unknown", "same_either_way": True, "length": 512}
    cells = [{"depth": 0.5, "width": 1.0, "count": 2, "exact": 0.5, "digit": 0.7, "nats": 1.0}]
    figures = dict.fromkeys(("exact", "digit", "nats"), estimate)
    return {
        "format": 1, "kind": "potexport-eval", "untouched": None, "text": None, "seed": 0,
        "protocol": {}, "notes": [], "costs": {},
        "model": {"source": "m", **asdict(manifest.model)}, "pot": asdict(manifest.pot),
        "policies": [{"label": "keydiff", "needs": ["keys"], "catalyst": ""}],
        "tasks": {"needle": {"unit": "digit", "rows": [{**row, **figures, "cells": cells}]}},
    }  # fmt: skip


def test_measurements_need_no_text(cli: Cli, several: Path, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(measured(several)))
    result = cli("report", several, "--eval", tmp_path / "one.json", "--eval",
                 tmp_path / "two.json", "-o", tmp_path / "r.html")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("Needles in a text") == 2
    assert "<dd>two.json</dd>" in html


def test_mistakes_are_one_line(
    cli: Cli, several: Path, bundle: Path, text: Path, tmp_path: Path
) -> None:
    output, garbled = tmp_path / "r.html", tmp_path / "garbled.json"
    garbled.write_text('{"kind": "potexport-eval"')
    other = measured(several)
    other["pot"]["slots"] = 512
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "empty.txt").write_text("")
    reading = ("--text", text)
    for arguments, words in (
        ((), "there is nothing to report"),
        (("--eval", tmp_path / "none.json"), "none.json cannot be read: No such file"),
        (("--eval", garbled), "garbled.json is not JSON, or cut short"),
        (("--eval", tmp_path / "other.json"), "was measured with another pot (slots 512"),
        (("--text", tmp_path / "none.txt"), "none.txt cannot be read"),
        (("--text", tmp_path / "empty.txt"), "empty.txt is empty"),
        ((*reading, "--policy", "best"), "has no policy 'best'; it has infinipot, keydiff"),
        ((*reading, "--mark", "no such words"), "are not in what is read"),
        ((*reading, "--question", ""), "The question is empty"),
        ((*reading, "--blind"), "--blind is about a question"),
        ((*reading, "--tokens", 0), "--tokens"),
        (("--eval", garbled, "--policy", "keydiff"), "There is no text for"),
    ):
        assert_refused(cli("report", several, "-o", output, *arguments, "--json"), words)
    assert_refused(cli("report", tmp_path, "-o", output, *reading), "is not a bundle")
    assert_refused(cli("report", several, "-o", tmp_path, *reading), "is a folder")
    nowhere = tmp_path / "none" / "r.html"
    assert_refused(cli("report", several, "-o", nowhere, *reading), "cannot write beside")
    assert not output.exists()


def shown(browser: str, page: Path, fragment: str, profile: Path) -> str:
    """The document as the browser has it once its script has run."""
    command = [browser, *FLAGS, "--virtual-time-budget=20000",
               f"--user-data-dir={profile}", "--dump-dom",
               f"{page.as_uri()}{fragment}"]  # fmt: skip
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
    return done.stdout.decode("utf-8")


def shades(html: str) -> list[str]:
    """Of each token, the step of the scale, or that it was not read."""
    return [next(c for c in classes.split() if c[0] in "cn") for classes, _ in spans_of(html)]


def by_hand(followed: Followed, tokens: int, step: int) -> list[str]:
    read, lists = followed.steps[step]
    levels = maps.levels(len(lists))
    counts = [sum(token in held for held in lists) for token in range(read)]
    return [f"c{levels[count]}" for count in counts] + ["n"] * (tokens - read)


@pytest.mark.parametrize(("label", "step"), [("keydiff", 0), ("infinipot", 3), ("streaming", 9)])
def test_a_browser_shades_the_text_of_any_step(
    browser: str, page: Path, followed: dict[str, Followed], tmp_path: Path, label: str, step: int
) -> None:
    html = shown(browser, page, f"#policy={label}&step={step}&token=1", tmp_path)
    assert f'data-shown="{label}/{step}"' in html
    mine = followed[label]
    assert shades(html) == by_hand(mine, mine.read, step)
    held = sum(1 in each for each in mine.steps[step][1])
    assert f"token 1: held by {held} of {len(mine.lists)} heads" in html
    squares = html[html.index('class="heads"') :]
    assert squares[: squares.index("</svg>")].count('class="on"') == held
    assert "<title>three.bundle: what the pot kept</title>" in html


HANDS = """<script>
addEventListener("load", async () => {
  const wait = () => new Promise((done) => setTimeout(done, 200));
  const states = [];
  const note = async () => { await wait(); states.push(document.documentElement.dataset.shown); };
  const slider = document.getElementById("step");
  const press = (key, more) => document.body.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
  await note();
  slider.value = 3; slider.dispatchEvent(new Event("input", { bubbles: true })); await note();
  document.getElementById("words").scrollIntoView();
  press("ArrowLeft"); await note();
  press("ArrowRight"); press("ArrowRight"); await note();
  document.querySelectorAll("input[name=policy]")[1].click(); await note();
  document.getElementById("play").click();
  await new Promise((done) => setTimeout(done, 1600));
  document.getElementById("play").click(); await note();
  document.getElementById("tokens").children[7].click(); await note();
  press("ArrowRight", { shiftKey: true }); await note();
  const token = /token ([0-9]+)/.exec(document.getElementById("one").textContent)[1];
  document.title = JSON.stringify({ states, token, hash: location.hash });
});
</script></body>"""


def test_a_browsers_slider_keys_and_buttons_change_the_shading(
    browser: str, page: Path, followed: dict[str, Followed], tmp_path: Path
) -> None:
    """A script that a page does not know works only once its own rules are taken out of it."""
    html = page.read_text(encoding="utf-8")
    strict = tmp_path / "strict.html"
    strict.write_text(html.replace("</body>", HANDS), encoding="utf-8")
    title = "<title>three.bundle: what the pot kept</title>"
    assert title in shown(browser, strict, "", tmp_path / "one")

    moved = tmp_path / "moved.html"
    open_to_all = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html)
    moved.write_text(open_to_all.replace("</body>", HANDS), encoding="utf-8")
    html = shown(browser, moved, "", tmp_path / "two")
    found = re.search(r"<title>(\{.*?\})</title>", html)
    assert found, html[:500]
    told = json.loads(unescape(found[1]))
    last = len(followed["infinipot"].steps) - 1
    assert told["states"] == [
        f"infinipot/{last}",
        "infinipot/3",
        "infinipot/2",
        "infinipot/4",
        "keydiff/4",
        "keydiff/6",
        "keydiff/6",
        "keydiff/6",
    ]
    assert told["token"] == "8"
    assert told["hash"] == "#policy=keydiff&step=6&token=8"
    mine = followed["keydiff"]
    assert shades(html) == by_hand(mine, mine.read, 6)
    assert shades(html) != by_hand(mine, mine.read, 3)
