"""The documentation against the code: no message is missing, no link leads nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("potexport", "graphs", "runtime", "targets", "tools")
# What a person sees; the last is of `tools`.
ERRORS = {"PotexportError", "UsageError", "FetchError"}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href|srcset)=\"([^\"]+)\"")


def _words(text: str) -> str:
    """Without what a page adds: code marks, and one blank for any white space."""
    return " ".join(text.replace("`", "").split())


def _raised(tree: ast.AST) -> Iterator[ast.expr]:
    """The message of each `raise PotexportError(message)`, and of others that a person sees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call):
            function = call.func
            name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            if name in ERRORS:
                yield call.args[0]


def _fragment(message: ast.expr) -> str:
    """The longest part of a message that is written out, up to where a value stands in it."""
    while isinstance(message, ast.BinOp):  # what is added stands elsewhere on the page
        message = message.left
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    literal = [part.value for part in parts if isinstance(part, ast.Constant)]
    return max((_words(str(part)) for part in literal), key=len, default="")


def _fragments() -> list[tuple[str, str]]:
    found = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("**/*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            for message in _raised(ast.parse(path.read_text(encoding="utf-8"))):
                found.append((f"{path.relative_to(ROOT)}:{message.lineno}", _fragment(message)))
    return found


MESSAGES = _fragments()


def test_there_are_messages() -> None:
    """Were none found, the next test could not fail."""
    assert len(MESSAGES) > 50


@pytest.mark.parametrize(("where", "fragment"), MESSAGES, ids=[where for where, _ in MESSAGES])
def test_every_message_is_explained(where: str, fragment: str) -> None:
    page = _words((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))
    assert len(fragment) >= 6, f"{where}: begin the message with words, not with a value"
    assert fragment in page, f"{where}: docs/errors.md does not have {fragment!r}"


def test_the_index_of_messages_has_every_section() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", page, re.MULTILINE)
    anchors = [
        "#" + re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in sections
    ]
    assert sorted(re.findall(r"\]\((#[^)]+)\)", page.partition("\n## ")[0])) == sorted(anchors)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [one or other for one, other in LINK.findall(text)]
    relative = [t for t in targets if not re.match(r"[a-z][a-z+.-]*:|#", t)]
    missing = [t for t in relative if not (page.parent / t.partition("#")[0]).exists()]
    assert not missing


def test_the_page_of_models_is_as_it_is_generated() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "models_page.py")], capture_output=True, check=True
    )
    page = (ROOT / "docs" / "models.md").read_bytes()
    assert made.stdout == page, "run: make models"
