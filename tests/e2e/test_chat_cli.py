"""`potexport chat`, on a tiny real bundle: turns, commands, Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from potexport.errors import PotexportError
from potexport.kept_text import Watched, pieces
from potexport.reporting.ledger import Ledger
from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session
from potexport.talking import Talk
from tests.e2e.helpers import Cli, Start, assert_refused
from tests.unit.chats import GEMMA

SYSTEM = "Speak of sheep."
SHORT = ("--max-new-tokens", 6, "--threads", 1, "--no-check")


def answers(bundle: Path, *questions: str, system: str | None = SYSTEM) -> list[str]:
    """By the library."""
    session = Session.open(bundle, threads=1)
    messages = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for question in questions:
        messages = [*(session.chat.messages or messages), {"role": "user", "content": question}]
        found.append("".join(token.text for token in session.chat(messages, max_new_tokens=6)))
    return found


def lines(result: Result) -> list[dict[str, Any]]:
    """Of --json, which tells nothing else."""
    assert (result.exit_code, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def turns(*given: str) -> str:
    """A line each: commands begin with a slash."""
    made = [{"command": e} if e.startswith("/") else {"content": e} for e in given]
    return "".join(json.dumps(each) + "\n" for each in made)


def test_turns_are_those_of_the_library(cli: Cli, bundle: Path) -> None:
    """Past the pot; an empty line is no turn, two slashes are one that is said."""
    result = cli("chat", bundle, "--system", SYSTEM, *SHORT, stdin="Who?\n\n//What?\r\nWhy, é?\n")
    expected = answers(bundle, "Who?", "/What?", "Why, é?")
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{each}\n" for each in expected)
    assert result.stderr.startswith("read ")
    found = lines(cli("chat", bundle, *SHORT, "--json", stdin=turns("Who?", "Why?", "So?")))
    assert [each["answer"] for each in found] == answers(bundle, "Who?", "Why?", "So?", system=None)
    assert not any(each["stopped"] for each in found)
    read = [each["stats"]["tokens_read"] for each in found]
    assert max(read[1:]) < read[0] + 10  # each turn reads itself alone
    assert sum(each["stats"]["compressions"] for each in found) > 0


def test_it_goes_on_in_another_process(start: Start, bundle: Path, tmp_path: Path) -> None:
    saved, other = tmp_path / "a.pot", tmp_path / "b.pot"

    def talk(*options: object, said: str) -> bytes:
        process = start("chat", bundle, *SHORT, *options)
        out, err = process.communicate(said.encode())
        assert process.returncode == 0, err
        return bytes(out)

    whole = "".join(f"{each}\n" for each in answers(bundle, "Who?", "Why?", "So?")).encode()
    begun = talk("--system", SYSTEM, "--save", saved, said=f"Who?\n/save {other}\nWhy?\n")
    assert whole == begun + talk("--load", saved, said="So?\n")
    assert whole.endswith(talk(said=f"Hm?\n/load {other}\nWhy?\nSo?\n").split(b"\n", 1)[1])


def test_commands(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    saved = str(tmp_path / "a.pot")
    said = ["Who?", "/system", f"/save {saved}", "/reset", "Who?", "/system Be brief.", "Who?"]
    said += ["/system", f"/load {saved}", "/system", "/pot", "/help", "/exit", "never said"]
    found = lines(cli("chat", bundle, "--system", SYSTEM, *SHORT, "--json", stdin=turns(*said)))
    assert len(found) == len(said) - 2
    assert found[1] == {"command": "/system", "system": SYSTEM}
    assert found[4]["answer"] == found[0]["answer"]
    assert found[4]["stats"]["tokens_read"] == found[0]["stats"]["tokens_read"]
    assert found[7] == {"command": "/system", "system": "Be brief."}
    assert found[9] == {"command": "/system", "system": SYSTEM}
    assert found[10]["unknown"] == found[10]["fill"]
    assert "/save PATH" in found[11]["help"]
    told = cli("chat", bundle, *SHORT, stdin=f"Who?\n/save {saved}\n/load {saved}\n/system\n/pot\n")
    for words in ("slots saved", "tokens were read", "there is no system prompt", "slots filled"):
        assert words in told.stderr


def test_mistakes_end_nothing(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A text\n")
    wrong = {
        "/nosuch": "no command /nosuch; /help",
        "/save": "/save needs a PATH",
        "/save nosuch/a.pot": "there is no folder",
        f"/save {tmp_path / 'README.md'}": "is no saved session, so it is not replaced",
        "/load nosuch.pot": "nosuch.pot cannot be read",
    }
    found = lines(cli("chat", bundle, *SHORT, "--json", stdin=turns("Who?", *wrong, "Why?")))
    for each, words in zip(found[1:-1], wrong.values(), strict=True):
        assert words in each["error"]
    assert found[-1]["answer"] == answers(bundle, "Who?", "Why?", system=None)[1]
    text = tmp_path / "text.pot"  # whose settings go with it
    ran = cli("run", bundle, "A text.", "--keep", 9, "--catalyst", "Sheep", "--save", text)
    assert ran.exit_code == 0
    opened = Session.open(bundle, threads=1)
    talk = Talk(opened, system=None, limit=6, sampling=Sampling(), stop=())
    before = talk.session.settings()
    with pytest.raises(PotexportError, match="holds a text and no conversation"):
        talk.load(str(text))
    after = talk.session.settings()
    assert (after.keep, after.asked, after.note) == (before.keep, before.asked, before.note)
    assert np.array_equal(after.catalyst, before.catalyst)
    bad = 'x\n[]\n{"content": ""}\n{"content": 1}\n{"content": "a", "x": 1}\n' + "[" * 100_000
    found = lines(cli("chat", bundle, *SHORT, "--json", stdin=bad))
    assert len(found) == 6
    assert all(list(each) == ["error"] for each in found)
    result = cli("chat", bundle, *SHORT, stdin=b"caf\xe9\n/nosuch\nWho?\n")
    assert result.exit_code == 0
    assert result.stdout == answers(bundle, "Who?", system=None)[0] + "\n"
    assert result.stderr.count("potexport: ") == 2


def test_chat_refuses(cli: Cli, copy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pot"
    assert cli("run", copy, "A text.", "--save", text).exit_code == 0
    assert_refused(cli("chat", copy, "--load", text), text, "no conversation", "run --load")
    talk = tmp_path / "talk.pot"
    assert cli("chat", copy, *SHORT, "--save", talk, stdin="Who?\n").exit_code == 0
    assert_refused(cli("run", copy, "--load", talk, "x"), "a conversation", "chat --load")
    assert_refused(cli("chat", copy, "--load", talk, "--system", "x"), "/system")
    assert_refused(cli("chat", copy, "--save", tmp_path), "is no saved session")
    assert_refused(cli("chat", copy, "--temperature", "nan"), "temperature")
    manifest = json.loads((copy / "potexport.json").read_text())
    (copy / "chat_template.jinja").write_text(GEMMA)
    manifest["files"]["chat_template.jinja"]["size"] = len(GEMMA)
    (copy / "potexport.json").write_text(json.dumps(manifest))
    assert_refused(cli("chat", copy, "--no-check", "--system", "x"), "System role not supported")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (copy / name).unlink()
        del manifest["files"][name]
    (copy / "potexport.json").write_text(json.dumps(manifest))
    assert_refused(cli("chat", copy, "--no-check"), "no chat template")


def read_until(process: subprocess.Popen[bytes], count: int) -> bytes:
    """So many bytes of what it says."""
    assert process.stdout
    seen = b""
    while len(seen) < count:
        block = os.read(process.stdout.fileno(), 65536)
        assert block, "it ended"
        seen += block
    return seen


def test_ctrl_c_stops_an_answer_and_not_the_program(start: Start, bundle: Path) -> None:
    process = start("chat", bundle, "--max-new-tokens", 10**9)
    assert process.stdin
    assert process.stderr
    for _ in range(2):  # the second answer begins where the first was left
        process.stdin.write(b"Who?\n")
        process.stdin.flush()
        read_until(process, 40)
        process.send_signal(signal.SIGINT)
        told = b""
        while b"stopped" not in told:
            told = process.stderr.readline()
            assert told
    process.send_signal(signal.SIGINT)  # at the prompt
    assert b"Ctrl-C again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 0
    assert err.startswith(b"read ")


def test_on_a_terminal_lines_are_edited(start: Start, bundle: Path) -> None:
    terminal, end = pty.openpty()
    process = start("chat", bundle, *SHORT, stdin=end, stdout=end, stderr=end)
    os.close(end)
    seen = b""
    for said in (b"Whp\x7fo?\n", b"\x04"):  # a letter taken back; Ctrl-D
        while not seen.endswith(b"> "):
            seen += os.read(terminal, 65536)
        seen += b"\n"
        os.write(terminal, said)
    try:
        while block := os.read(terminal, 65536):
            seen += block
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert b"/help lists commands" in seen
    assert answers(bundle, "Who?", system=None)[0].strip().encode() in seen.replace(b"\r", b"")
    assert b"slots filled" in seen


def test_what_is_kept_is_what_compressions_kept(bundle: Path, book: str) -> None:
    """Against the account that `report` keeps, which counts tokens and not slots."""
    session = Session.open(bundle, threads=1)
    watched = session.backend = Watched(session.backend)
    layout, ids = session.manifest.layout, session.text.encode(book)
    ledger = Ledger([layout.facts.kv_heads] * len(layout.chosen), ids.size)
    session.on_compress = lambda kept: ledger.compress(kept, session.stats.tokens_read)
    session.feed(ids)
    session.logits()
    assert session.stats.compressions > 20
    lives = ledger.lives()
    shares = lives.counts(lives.steps - 1) / len(lives.gone)
    assert np.allclose(watched.shares(), shares)
    found = list(pieces(session.text, watched))
    assert sum(piece.tokens for piece in found) == ids.size
    assert [piece.held for piece in found[:2]] == [True, False]
    kept = "".join(piece.text for piece in found if piece.held)
    assert 0 < len(kept) < len(book) / 10
    assert found[-1].held
    assert book.endswith(found[-1].text)
