"""A tiny real model, its bundle, and the command line in this process or in one of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.e2e.helpers import BROWSERS, ROOT, Cli, Start

# Odd sizes, so that no two letters of the contract are equal by chance.
POT = {"pot": 48, "chunk": 8, "keep": 24, "catalyst-width": 8, "sink": 2, "recent": 4}
PATIENCE = 120  # seconds that a process of its own may take
OPTIONS = [text for name, value in POT.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def book() -> str:
    """Some 1,500 tokens of the tiny tokenizer: dozens of compressions."""
    return (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")[2000:6000]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and a byte-level BPE, as save_pretrained writes them; a blank in the path."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("model") / "tiny llama"
    # More ids than the tokenizer has, as many real models do.
    return tiny.save(folder, "llama-tied", vocab_size=307, num_hidden_layers=2)


@pytest.fixture(scope="session")
def bundle(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, by the command line; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny.bundle"
    result = run_here("build", model_folder, "-o", folder, *OPTIONS, "--policy", "infinipot")
    assert result.exit_code == 0, result.stderr
    return folder


def run_here(*arguments: object, stdin: str | bytes | None = None) -> Result:
    from potexport.cli import cli

    result = CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def cli() -> Cli:
    """The command line in this process; a bug of the product is raised."""
    return run_here


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """The command line as a process of its own. One that a test waits for in vain is ended."""
    clocks = list[threading.Timer]()

    def start(*arguments: object, **settings: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "potexport", *map(str, arguments)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, env=environment, preexec_fn=_interruptible, **{**pipes, **settings}
        )
        clocks.append(threading.Timer(PATIENCE, process.kill))
        clocks[-1].daemon = True
        clocks[-1].start()
        return process

    yield start
    for clock in clocks:
        clock.cancel()


def _interruptible() -> None:
    """What a shell started in its background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def pot_options() -> list[str]:
    """The geometry of `bundle`, for another build."""
    return OPTIONS


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: install the package chromium to test pages in a browser")
    return found


@pytest.fixture
def model_copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "b"))
