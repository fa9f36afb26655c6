"""`optimum-cli export potexport`: the same command as `potexport build`, options and all."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from potexport import bundle as bundles
from potexport.cli_build import build
from tests.e2e.helpers import ROOT

NAMESPACE, FOLDER = "optimum.commands.register", ROOT / "potexport" / "optimum_register"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH; where the project is not installed, with what installing adds to optimum."""
    found = importlib.util.find_spec(NAMESPACE)
    files = [
        Path(place, "register_potexport.py")
        for place in (found and found.submodule_search_locations) or ()
    ]
    if any(file.exists() for file in files):
        return str(ROOT)
    portion = tmp_path_factory.mktemp("portion")
    link = portion.joinpath(*NAMESPACE.split("."))
    link.parent.mkdir(parents=True)
    link.symlink_to(FOLDER)
    return os.pathsep.join([str(ROOT), str(portion)])


def export(path: str, *words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "potexport"]
    return subprocess.run(
        [*program, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_makes_the_bundle_that_build_makes(
    path: str, model_folder: Path, bundle: Path, tmp_path: Path, pot_options: list[str]
) -> None:
    output = tmp_path / "a bundle"
    words = ["--model", model_folder, "--output", output, "--policy", "infinipot", *pot_options]
    done = export(path, *words)
    assert done.returncode == 0, done.stderr
    assert bundles.read(output) == bundles.read(bundle)
    for file in bundle.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes(), file.name


def test_it_has_the_options_of_build(path: str) -> None:
    done = export(path, "--help")
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  (?:-\w[^,]*, )?(--[\w-]+)", done.stdout, re.MULTILINE)
    wanted = [option.opts[-1] for option in build.params if option.param_type_name == "option"]
    assert listed == ["--help", "--model", *wanted]
    assert "an eighth of the model's context" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--output x", "the following arguments are required: -m/--model"),
        ("--model nosuch --output x", "nosuch does not exist; expected a folder"),
        ("--model nosuch --output x --pott 5", "unrecognized arguments: --pott 5"),
        ("--model nosuch --output x --pot many", "'many' is not a valid integer"),
        ("--model nosuch --output x --pot", "argument --pot: expected one argument"),
        ("--model nosuch", "Missing option '-o' / '--output'"),
        ("--model nosuch --output x --policy a --policy b --adapter", "--adapter: expected one"),
    ],
)
def test_a_mistake_is_one_line(path: str, words: str, said: str) -> None:
    done = export(path, *words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("potexport: ")
    assert said in line
