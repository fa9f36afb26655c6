"""`potexport serve` with options that cannot work: one line, before anything listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.helpers import Cli, assert_refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--api-key-file", "nosuch"], ("nosuch cannot be read",)),
        (["--api-key-file", "empty"], ("empty is empty",)),
        (["--api-key-file", "short"], ("at least 8 letters",)),
        (["--host", "nosuch.invalid"], ("cannot listen on nosuch.invalid",)),
        (["--state", "short"], ("short cannot be used",)),
        (["--temperature", "-1"], ("temperature is -1.0",)),
        (["--keep", "3"], ("keep",)),
        (["--policy", "nosuch"], ("nosuch",)),
    ],
    ids=str,
)
def test_serve_refuses(
    cli: Cli,
    bundle: Path,
    options: list[str],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("short").write_text("abc\n")
    assert_refused(cli("serve", bundle, *options), *words)
