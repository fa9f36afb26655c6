"""Targets: what a person names, and the page made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from potexport import targets
from potexport.errors import PotexportError

ROOT = Path(__file__).parents[2]
STATES = {"executed here", "compiled here", "not here"}


@pytest.mark.parametrize(
    ("runtime", "name"), [(each, name) for each in targets.PACKAGES for name in targets.names(each)]
)
def test_a_target_says_what_it_is(runtime: str, name: str) -> None:
    target = targets.load(name, runtime)
    assert target.name == name
    assert target.runtime.partition("-")[0] == runtime
    assert bool(target.delegate) == (runtime == "executorch")
    assert target.default_precision in target.precisions
    assert target.proven in STATES
    assert not target.compiler or target.socs
    assert not target.socs or target.compiler or target.delegate
    assert bool(target.package) == bool(target.extra)
    assert len({soc.name for soc in target.socs}) == len(target.socs)


def test_chips_are_found_in_any_case_and_once() -> None:
    target = targets.load("android-npu")
    found = target.chips(["SM8750", "sm8550", "sm8750"])
    assert [(soc.name, soc.htp_arch, soc.soc_model) for soc in found] == [
        ("sm8750", 79, 69),
        ("sm8550", 73, 43),
    ]


def test_a_wrong_chip_is_answered_with_those_there_are() -> None:
    with pytest.raises(PotexportError, match=r"'sm1'.*sm8550 \(Snapdragon 8 Gen 2\), sm8650"):
        targets.load("android-npu").chips(["sm8550", "sm1"])


def test_the_page_what_runs_where_is_that_of_the_targets() -> None:
    """`make docs` writes it."""
    found = [target.to_json() for target in targets.every()]
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "what_runs_where.py"],
        input=json.dumps(found).encode(),
        capture_output=True,
        check=True,
    )
    assert (ROOT / "docs" / "targets.md").read_text(encoding="utf-8") == made.stdout.decode()
