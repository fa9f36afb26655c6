"""The page: what is told of a bundle, its measurements and a text, put into one file of HTML.

Texts, labels and file names are a stranger's: the template escapes all of them, and the page's own
policy (Content-Security-Policy) runs no script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from potexport import __version__
from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.reporting import tables, text
from potexport.reporting.evals import Measured, Task
from potexport.reporting.trace import Trace

TITLES = {
    "needle": "Needles in a text",
    "hit-rate": "Hit rate",
    "perplexity": "Perplexity",
    "qa": "Questions about long texts",
    "summary": "Summaries",
}
INTROS = {
    "needle": "Facts hidden in prose and asked for afterwards: the share of answers that are right "
    "to the last sign, and of signs that are right.",
    "hit-rate": "The share of the tokens that a full cache attends to most that the pot still "
    "holds.",
    "perplexity": "How surprised the model is by the prose itself, past the first full pot; lower "
    "is better.",
    "qa": "The overlap of words between answer and reference, token F1.",
    "summary": "The longest common part of summary and reference, ROUGE-L.",
}


def render(name: str, manifest: Manifest, measured: Sequence[Measured], trace: Trace | None) -> str:
    """The whole page. name: of the bundle."""
    style, script = (_own(file) for file in ("style.css", "text.js"))
    parts = [_part(each, number) for number, each in enumerate(measured)]
    contents = [(part["id"], part["title"]) for part in parts]
    if trace:
        contents += [("costs", "Memory and speed"), ("text", "The text")]
    return _template().render(
        bundle=name,
        version=__version__,
        lead=_lead(manifest),
        contents=contents,
        facts=_facts(manifest),
        measured=parts,
        text=text.view(trace, manifest) if trace else None,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def check_output(path: Path) -> None:
    """Refuse a place that cannot be written, before minutes of reading."""
    if path.is_dir():
        raise PotexportError(f"the report's output {path} is a folder; name a file, such as r.html")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PotexportError(
            f"cannot write beside {path}; choose another --output, in a folder that exists"
        )


def write(path: Path, content: str) -> int:
    """Write a file whole or not at all; its size in bytes."""
    data = content.encode("utf-8")
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return len(data)


def _umask() -> int:
    """What a plain `open` would take away; the temporary file is private."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_own),
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def _own(file: str) -> str:
    return (resources.files(__package__) / file).read_text(encoding="utf-8")


def _hash(content: str) -> Markup:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return Markup(f"sha256-{base64.b64encode(digest).decode('ascii')}")


def _lead(manifest: Manifest) -> str:
    pot = manifest.pot
    return (
        f"A text of any length, read into a pot of {pot.slots:,} slots. Each time it is full, "
        f"{pot.keep:,} are kept; this page shows which, and what that costs."
    )


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    model, pot = manifest.model, manifest.pot
    policies = [policy.label for policy in manifest.policies]
    return [
        ("model", f"{manifest.source}, {model.model_type}"),
        ("heads", f"{model.layers} layers × {model.kv_heads} key/value heads of {model.head_size}"),
        ("pot", f"{pot.slots:,} slots, {pot.keep:,} kept"),
        ("always kept", f"{pot.sink} first and {pot.recent} last slots"),
        ("read at a time", f"{pot.chunk} tokens"),
        ("policies" if len(policies) > 1 else "policy", ", ".join(policies)),
        ("runs on", f"{manifest.runtime}, {manifest.precision}, {manifest.target}"),
    ]


def _part(measured: Measured, number: int) -> dict[str, Any]:
    return {
        "id": f"measured-{number + 1}",
        "title": f"Measured: {measured.text or measured.file}",
        "facts": _about(measured),
        "notes": measured.notes,
        "tasks": [_task(task) for task in measured.tasks],
        "costs": [
            (tables.said(label), f"{speed:,.0f}", f"{share:.1%}")
            for label, (speed, share) in measured.costs.items()
        ],
        "protocol": list(measured.protocol.items()),
    }


def _about(measured: Measured) -> list[tuple[str, str]]:
    modes = {mode: None for task in measured.tasks for mode in task.questions}
    facts = [
        ("file", measured.file),
        ("question while reading", " and ".join(modes) or "not asked"),
        ("scores the pot where it is unknown", _catalysts(measured)),
        ("kept by a compression", f"{measured.keep:,} slots"),
        ("full cache", measured.untouched or "not measured"),
        ("seed", str(measured.seed)),
    ]
    if measured.text:
        facts.insert(0, ("text", measured.text))
    if measured.command:
        facts.append(("command", measured.command))
    return facts


def _catalysts(measured: Measured) -> str:
    return (
        "; ".join(f"“{text.strip()}”" if text else "nothing" for text in measured.catalysts)
        or "nothing"
    )


def _task(task: Task) -> dict[str, Any]:
    counts = ", ".join(f"{count:,} {name}" for name, count in task.facts.items())
    return {
        "title": TITLES[task.name],
        "intro": INTROS[task.name] + (f" Of {counts}." if counts else ""),
        "tables": [tables.table(task, question) for question in task.questions],
    }
