"""What the tests of the command line share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

ROOT = Path(__file__).resolve().parents[2]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Cli = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[bytes]"]


def assert_refused(result: Result, *words: object) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that has all these words."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("potexport: ")
    for word in words:
        assert str(word) in lines[0]
