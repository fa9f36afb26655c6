"""A session in a file: what a person asks of it, and what becomes of files that are not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from potexport import bundle as bundles
from potexport.errors import PotexportError
from potexport.runtime.pot import Pot
from potexport.runtime.session import Session
from tests.e2e.helpers import ROOT, Cli, assert_refused

QUESTIONS = ("Who?", "What of it?")
ASKED = ("--max-new-tokens", 12, "--json")


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Session:
    return Session.open(bundle, threads=1)


@pytest.fixture(scope="module")
def whole(opened: Session, book: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session behind some compressions, with logits that nothing followed."""
    path = tmp_path_factory.mktemp("saved") / "book.pot"
    opened.reset()
    opened.feed(book[:600])
    opened.logits()
    opened.save(path)
    return path


def answer(cli: Cli, *arguments: object, stdin: str | None = None) -> dict[str, Any]:
    result = cli("run", *arguments, *ASKED, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_text_is_read_once_and_asked_twice(
    cli: Cli, bundle: Path, book: str, tmp_path: Path
) -> None:
    """Each answer is the one that reading it again would give."""
    saved, text = tmp_path / "book.pot", tmp_path / "book.txt"
    text.write_text(book, encoding="utf-8")
    found = answer(cli, bundle, "--file", text, "--catalyst", "Sum", "--save", saved)
    assert (found["answer"], found["stats"]["tokens_generated"]) == ("", 0)
    assert found["stats"]["compressions"] > 20
    for question in QUESTIONS:
        by = ("--question", question, "--catalyst", "Sum")
        again = answer(cli, bundle, "--file", text, *by)
        loaded = answer(cli, bundle, "--load", saved, question, "--catalyst", "Sum")
        assert loaded["token_ids"] == again["token_ids"]
        assert loaded["stats"]["tokens_read"] < 60 < again["stats"]["tokens_read"]
    # Saved in passing, it is the same: what was asked is not in it.
    passing = tmp_path / "passing.pot"
    answer(cli, bundle, "--file", text, *by, "--save", passing)
    assert answer(cli, bundle, "--load", passing, question)["token_ids"] == again["token_ids"]


def test_a_system_prompt_alone_and_more_text_later(
    cli: Cli, bundle: Path, book: str, tmp_path: Path
) -> None:
    saved, more = tmp_path / "system.pot", tmp_path / "more.pot"
    system = ("--system", "Be brief.")
    answer(cli, bundle, *system, "--save", saved, stdin="")
    by = ("--catalyst", "Sum")
    once = answer(cli, bundle, book, *system, "--question", "Who?", *by)
    text = tmp_path / "book.txt"
    text.write_text(book, encoding="utf-8")
    loaded = answer(cli, bundle, "--load", saved, "--file", text, "Who?", *by, "--save", more)
    assert loaded["token_ids"] == once["token_ids"]
    assert answer(cli, bundle, "--load", more, "Who?")["token_ids"] == once["token_ids"]
    plain = answer(cli, bundle, "Hello.", *system)
    assert answer(cli, bundle, "--load", saved, "Hello.")["token_ids"] == plain["token_ids"]


def test_a_raw_text_goes_on_raw(cli: Cli, bundle: Path, book: str, tmp_path: Path) -> None:
    saved = tmp_path / "raw.pot"
    plain = answer(cli, bundle, book, "--raw")
    answer(cli, bundle, book, "--raw", "--save", saved)
    assert answer(cli, bundle, "--load", saved)["token_ids"] == plain["token_ids"]


def test_what_is_told(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a.pot"
    result = cli("run", bundle, "Some text.", "--save", saved)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "slots saved" in result.stderr
    result = cli("run", bundle, "--load", saved, "Who?", "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert "tokens were read" in result.stderr
    assert "0 compressions, " in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--load", "nosuch.pot", "x"], ("nosuch.pot cannot be read",)),
        (["--load", ".", "x"], (". cannot be read: it is no file",)),
        (["--load", "README.md", "x"], ("README.md is no saved session",)),
        (["x", "--save", "README.md"], ("README.md exists and is no saved session",)),
        (["x", "--save", "nosuch/a.pot"], ("there is no folder nosuch",)),
        (["x", "--save", "."], (". exists and is no saved session",)),
        (["--load", "a.pot", "--system", "y", "x"], ("--system", "--save")),
    ],
)
def test_run_refuses(
    cli: Cli,
    bundle: Path,
    options: list[str],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# A text\n")
    assert_refused(cli("run", bundle, *options), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_another_bundle_is_refused(
    cli: Cli, bundle: Path, copy: Path, whole: Path, model_folder: Path
) -> None:
    manifest = json.loads((copy / bundles.MANIFEST).read_text())
    weights = manifest["files"][manifest["weights"]]
    weights["sha256"] = "0" + weights["sha256"][1:]
    (copy / bundles.MANIFEST).write_text(json.dumps(manifest))
    refused = cli("run", copy, "--load", whole, "x", "--no-check")
    assert_refused(refused, whole, "saved with another bundle")
    shutil.copytree(bundle, copy, dirs_exist_ok=True)  # where a bundle lies does not matter
    Session.open(copy, threads=1, saved=whole)


def edited(path: Path, into: Path, **facts: Any) -> Path:
    """A file whose digest fits, as a forger would write it."""
    import hashlib

    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    data = bytearray(raw[begin:])
    values = {name: each for name, each in facts.items() if isinstance(each, np.ndarray)}
    for name, array in values.items():
        first, last = header[name.replace("__", ".")]["data_offsets"]
        data[first:last] = array.tobytes()
    said = json.loads(header["__metadata__"]["potexport"])
    said |= {name: each for name, each in facts.items() if name not in values}
    text = json.dumps(said)
    digest = hashlib.sha256(text.encode() + data).hexdigest()
    header["__metadata__"] = {"potexport": text, "sha256": digest}
    made = json.dumps(header).encode()
    into.write_bytes(len(made).to_bytes(8, "little") + made + data)
    return into


def test_the_editor_can_also_leave_a_file_whole(
    opened: Session, whole: Path, tmp_path: Path
) -> None:
    """Otherwise the next test would pass whatever it edits."""
    opened.load(edited(whole, tmp_path / "a.pot", novelty=0.25))


@pytest.mark.parametrize(
    "facts",
    [
        {"format": 3},
        {"format": 1},
        {"format": 0},
        {"format": "2"},
        {"fills": [49]},
        {"fills": [-1]},
        {"fills": [1 << 40]},
        {"fills": [24, 24]},
        {"fills": "24"},
        {"position": 10**30},
        {"position": 3},
        {"position": -1},
        {"pinned": -1},
        {"pinned": 21},
        {"pinned": 10**30},
        {"pinned": None},
        {"novelty": float("nan")},
        {"novelty": 10**400},
        {"stats": {}},
        {"stats": None},
        {"fed": 9},
        {"keep": 3},
        {"keep": 1000},
        {"keep_mass": "0.9"},
        {"policy": "nosuch"},
        {"policy": None},
        {"to_come": "1"},
        {"past_key_values__0__key": np.full(4, np.nan, np.float32)},
        {"positions__1": np.full(2, 1000, np.int32)},
        {"positions__1": np.full(2, -5, np.int32)},
        {"catalyst": np.array([307], np.int32)},
    ],
    ids=str,
)
def test_a_forged_file_is_refused(
    opened: Session, whole: Path, facts: dict[str, Any], tmp_path: Path
) -> None:
    raw = whole.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, array in facts.items():
        if isinstance(array, np.ndarray):
            first, last = header[name.replace("__", ".")]["data_offsets"]
            facts[name] = np.resize(array, (last - first) // array.itemsize)
    with pytest.raises(PotexportError, match=r"a\.pot (is damaged|has format [13])"):
        opened.load(edited(whole, tmp_path / "a.pot", **facts))


@pytest.mark.parametrize("policy", [None, 5, "nosuch", [1 << 63] * 99])
def test_nor_is_a_bundle_opened_with_a_policy_it_has_not(
    bundle: Path, whole: Path, policy: object, tmp_path: Path
) -> None:
    forged = edited(whole, tmp_path / "a.pot", policy=policy)
    with pytest.raises(PotexportError, match=r"a\.pot is damaged"):
        Session.open(bundle, threads=1, saved=forged)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_file_that_changed_is_refused_or_says_the_same(
    opened: Session, whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(whole.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "bit in the header", "bit", "more"]))
    if kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "more":
        raw += data.draw(st.binary(min_size=1, max_size=20))
    else:
        end = header if kind == "bit in the header" else len(raw)
        raw[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = tmp_path / "other.pot"
    other.write_bytes(raw)
    opened.load(whole)
    before = opened.snapshot()
    with suppress(PotexportError):  # what says the same may be taken
        opened.load(other)
    after = opened.snapshot()
    assert after.stats == before.stats
    assert np.array_equal(after.pending, before.pending)
    assert after.pot.position == before.pot.position
    for name, array in before.pot.arrays.items():
        assert np.array_equal(after.pot.arrays[name], array), name


def test_it_is_a_safetensors_file(opened: Session, whole: Path) -> None:
    """By the format's own package."""
    opened.load(whole)
    state = opened.snapshot()
    with safe_open(whole, "np") as file:
        assert set(file.metadata()) == {"potexport", "sha256"}
        for name, array in state.pot.arrays.items():
            assert np.array_equal(file.get_tensor(name), array)
        assert state.last is not None
        assert np.array_equal(file.get_tensor("logits"), state.last)


SAVING = """
import sys
from dataclasses import replace
from potexport import bundle
from potexport.runtime.pot import Pot
from potexport.runtime.records import Settings, State, Stats
from potexport.runtime.saved import write_session
import numpy as np

manifest = bundle.read(sys.argv[1])
pot, none = Pot(manifest.layout), np.empty(0, np.int32)
pot.fill = 40
settings = Settings(manifest.policy.label, 24, 0.9, False, none, "")
for number in range(int(sys.argv[3]), 1 << 20):
    for each in (*pot.keys, *pot.values):
        each[...] = number
    state = State(pot.save(), none, 0, 0.0, None, None, none, Stats(tokens_read=number))
    write_session(sys.argv[2], manifest, state, settings)
    print(number, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up there")
def test_a_killed_save_leaves_the_old_one(opened: Session, bundle: Path, tmp_path: Path) -> None:
    """A process that saves again and again is killed at any moment, ten times."""
    path, number = tmp_path / "a.pot", 1
    random = np.random.default_rng(0)
    left = 0
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(bundle), str(path), str(number)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert child.stdout is not None
        said = [child.stdout.readline()]
        time.sleep(random.uniform(0, 0.02))
        child.kill()
        said += child.stdout.read().splitlines(keepends=True)
        child.wait()
        last = int([line for line in said if line.endswith(b"\n")][-1])
        opened.load(path)
        number = opened.stats.tokens_read
        assert number in (last, last + 1)
        pot = opened.backend.pot
        for each in pot.keys:
            assert (each[..., :40] == number).all()
        beside = [each for each in os.listdir(tmp_path) if each != path.name]
        assert len(beside) <= 1  # the next save removes what the killed one left
        left += len(beside)
    assert left  # some were killed as they wrote


def test_a_fork_shares_nothing(opened: Session, book: str) -> None:
    opened.reset()
    opened.feed(book)
    plain = [token.id for token in opened.generate(max_new_tokens=40)]
    opened.reset()
    opened.feed(book)
    twin = opened.fork()
    assert twin.stats == opened.stats
    other = twin.fork()
    other.feed(book[:300])  # what one reads the others do not see
    other.logits()
    streams = [each.generate(max_new_tokens=40) for each in (opened, twin)]
    for token in plain:
        assert [next(stream).id for stream in streams] == [token, token]
    arrays = [*opened.backend.pot._arrays(), *twin.backend.pot._arrays()]
    assert len({array.ctypes.data for array in arrays}) == len(arrays)
    assert isinstance(twin.backend.pot, Pot)


def test_settings_and_note_come_along(bundle: Path, tmp_path: Path) -> None:
    session = Session.open(bundle, threads=1)
    session.keep, session.keep_mass, session.note = "auto", 0.7, "Chapter 1"
    session.set_catalyst("Who?")
    session.feed("Some text.")
    session.save(tmp_path / "a.pot")
    other = Session.open(bundle, threads=1, saved=tmp_path / "a.pot")
    assert (other.keep, other.keep_mass, other.note) == ("auto", 0.7, "Chapter 1")
    assert np.array_equal(other.catalyst, session.catalyst)
    assert other.policy == session.policy


def test_a_forged_conversation_is_refused(session_said: Session, tmp_path: Path) -> None:
    """What was said is data as the rest is: its types are looked at."""
    path = tmp_path / "said.pot"
    session_said.save(path)
    whole = session_said.said
    assert whole is not None
    session_said.load(edited(path, tmp_path / "a.pot", novelty=0.25))
    assert session_said.said == whole
    size = len(whole.to_bytes())
    for said in (b"", b"[" * size, b"{}", b"[]", b'{"messages": 3}', b"\xff\xfe"):
        forged = np.frombuffer(said.ljust(size)[:size], np.uint8)
        with pytest.raises(PotexportError, match=r"a\.pot is damaged"):
            session_said.load(edited(path, tmp_path / "a.pot", conversation=forged))
        assert session_said.said == whole


@pytest.fixture
def session_said(opened: Session) -> Session:
    opened.reset()
    for _ in opened.chat([{"role": "user", "content": "Who?"}], max_new_tokens=3):
        pass
    return opened
