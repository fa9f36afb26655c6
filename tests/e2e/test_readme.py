"""What the README tells a newcomer to type, as it stands there, on a tiny bundle in a new folder.

What needs a hub, a Snapdragon or minutes is not typed; the page in a browser is in test_web.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.helpers import ROOT
from tests.serving import serving

SECONDS = 120  # that a command may take
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TYPED = re.compile(r"^\$ (potexport (?:run|chat|inspect) smol\.bundle.*)\n((?:> .*\n|(?!\$).*\n)*)")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for found, block in BLOCK.findall(text) if found == language]


def commands() -> list[tuple[str, str]]:
    """Each that uses smol.bundle, and what is typed while it runs."""
    found = []
    for block in blocks("README.md", "console"):
        for part in re.split(r"(?m)^(?=\$ )", block):
            if typed := TYPED.match(part):
                answers = re.findall(r"^> (.*)$", typed[2], re.MULTILINE)
                found.append((typed[1].partition("  #")[0], "".join(f"{a}\n" for a in answers)))
    return found


@pytest.fixture
def folder(bundle: Path, book: str, tmp_path: Path) -> Path:
    """As a newcomer's, with the files that the page names."""
    shutil.copytree(bundle, tmp_path / "smol.bundle")
    for name in ("report.txt", "chapters.txt"):
        (tmp_path / name).write_text(book, encoding="utf-8")
    return tmp_path


def run(command: list[str], folder: Path, stdin: str = "") -> tuple[str, str]:
    """What it prints: answers, and what it says of them."""
    programs = str(Path(sys.executable).parent)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout, done.stderr


def test_the_command_line(folder: Path) -> None:
    typed = commands()
    named = [command.split()[1] for command, _ in typed]
    assert {"run", "chat", "inspect"} <= set(named)
    for command, stdin in typed:
        out, said = run(["bash", "-c", command], folder, stdin)
        if " inspect " in command:
            assert "prefill" in out
            continue
        assert re.search(r"^read [\d,]+ tokens .*peak memory", said, re.MULTILINE), command
        assert len(out.splitlines()) >= len(stdin.splitlines())
    assert {"chapters.pot", "talk.pot"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("number", range(2))
def test_python(folder: Path, number: int) -> None:
    code = blocks("README.md", "python")[number]
    assert "Session.open" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    out, _ = run([sys.executable, "-c", code], folder)
    assert re.search(r"\([\d,]+ tokens", out)


def test_http(folder: Path) -> None:
    """The client of docs/serve.md, which the README runs; its server on a free port."""
    (code,) = blocks("docs/serve.md", "python")
    assert "http://127.0.0.1:8080/v1" in code
    with serving(folder / "smol.bundle", "--threads", 1) as server:
        own = code.replace("http://127.0.0.1:8080", server.url)
        out, _ = run([sys.executable, "-c", own], folder)
    first, second = re.findall(r" ([\d,]+) read\)", out)
    assert int(second.replace(",", "")) < int(first.replace(",", ""))
