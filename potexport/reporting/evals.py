"""What `potexport eval` wrote, read back: rows of figures with their intervals.

Takes what the page shows and nothing else; refuses what is garbled, newer, or of another pot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potexport.bundle import Manifest
from potexport.errors import PotexportError

KIND, FORMAT = "potexport-eval", 1
LARGEST = 64 << 20  # bytes
# Of each task, in the order of the page: what is drawn, then what is only told in numbers.
FIGURES: dict[str, tuple[str, ...]] = {
    "needle": ("exact", "digit", "nats"),
    "hit-rate": ("rate",),
    "perplexity": ("perplexity",),
    "qa": ("score",),
    "summary": ("score",),
}
BASELINES = ("full", "oracle", "random", "truncation")
QUESTIONS = ("unknown", "known")
CHOSEN = frozenset({"keep"})  # of the pot, anew for each run


@dataclass(frozen=True)
class Estimate:
    """A mean over documents and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """Needles of one length whose depth, from 0 to 1, lies around `depth`."""

    depth: float
    width: float
    count: int
    figures: dict[str, float]  # exact, digit


@dataclass(frozen=True)
class Row:
    """One policy on one length, or on one data set. same: it cannot depend on the question. scored:
    a text scored the pot, the question or an instruction."""

    policy: str
    question: str
    same: bool
    scored: bool
    column: int | str
    figures: dict[str, Estimate]
    held: float | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Task:
    """All rows of one task. unit: what `digit` of needles counts. facts: counts worth saying."""

    name: str
    rows: tuple[Row, ...]
    unit: str
    facts: dict[str, int]

    @property
    def columns(self) -> list[int | str]:
        return list(dict.fromkeys(row.column for row in self.rows))

    @property
    def questions(self) -> list[str]:
        return [mode for mode in QUESTIONS if any(row.question == mode for row in self.rows)]


@dataclass(frozen=True)
class Measured:
    """One file. keep: slots that compressions left. catalysts: texts that scored the pot where the
    question was unknown. costs: label -> (tokens a second while reading, share of it in
    compressions)."""

    file: str
    policies: tuple[str, ...]
    source: str
    untouched: str | None
    text: str | None
    seed: int
    command: str | None
    keep: int
    catalysts: tuple[str, ...]
    protocol: dict[str, str]
    notes: tuple[str, ...]
    tasks: tuple[Task, ...]
    costs: dict[str, tuple[float, float]]


def read(path: Path, manifest: Manifest) -> Measured:
    """The measurements in a file, which must be of this bundle's model and pot.

    Raises PotexportError, naming the file.
    """
    document = _document(path)
    try:
        _same(path, document, manifest)
        return _measured(path.name, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PotexportError(
            f"{path} is not a complete measurement ({type(error).__name__}: {error}); run "
            "potexport eval again with --output"
        ) from error


def _document(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise PotexportError(f"{path} is larger than any measurement; give what eval wrote")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PotexportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PotexportError(
            f"{path} is not JSON, or cut short; give what potexport eval wrote with --output"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise PotexportError(
            f"{path} was not made by potexport eval; give what it wrote with --output"
        )
    if document.get("format") != FORMAT:
        raise PotexportError(
            f"{path} has format {document.get('format')!r}; this potexport reads {FORMAT}: run "
            "potexport eval again, or update potexport"
        )
    return document


def _same(path: Path, document: dict[str, Any], manifest: Manifest) -> None:
    """Refuse figures of another model or pot: beside this one's they would mislead."""
    for what, mine in (("model", asdict(manifest.model)), ("pot", asdict(manifest.pot))):
        theirs = document[what]
        for name, value in mine.items():
            if name in theirs and name not in CHOSEN and _plain(theirs[name]) != _plain(value):
                raise PotexportError(
                    f"{path} was measured with another {what} ({name.replace('_', ' ')} "
                    f"{_plain(theirs[name])}; the bundle has {_plain(value)}); give that bundle, "
                    "or run potexport eval with this one"
                )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value))


def _measured(file: str, document: dict[str, Any]) -> Measured:
    text, command = document["text"], document.get("command")
    return Measured(
        file=file,
        policies=tuple(str(policy["label"]) for policy in document["policies"]),
        source=str(document["model"]["source"]),
        untouched=None if document["untouched"] is None else str(document["untouched"]),
        text=None if text is None else str(text["name"]),
        seed=int(document["seed"]),
        command=None if command is None else str(command),
        keep=int(document["pot"]["keep"]),
        catalysts=_catalysts(document["policies"]),
        protocol={str(name): str(said) for name, said in document["protocol"].items()},
        notes=tuple(map(str, document["notes"])),
        tasks=tuple(
            _task(name, document["tasks"][name], _blind(document["policies"]))
            for name in FIGURES
            if name in document["tasks"]
        ),
        costs={
            str(label): (
                cost["tokens"] / max(cost["read_seconds"] + cost["compress_seconds"], 1e-9),
                float(cost["share"]),
            )
            for label, cost in document.get("costs", {}).items()
        },
    )


def _catalysts(policies: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of the policies that attend to one."""
    found = (str(each["catalyst"]) for each in policies if "mass" in each["needs"])
    return tuple(dict.fromkeys(found))


def _blind(policies: list[dict[str, Any]]) -> frozenset[str]:
    """Of those the labels whose pot nothing scored where the question was unknown."""
    return frozenset(str(each["label"]) for each in policies if not each["catalyst"])


def _task(name: str, task: Mapping[str, Any], blind: frozenset[str]) -> Task:
    rows = tuple(_row(row, FIGURES[name], blind) for row in task["rows"])
    counts = {key: int(task[key]) for key in ("documents", "questions") if key in task}
    return Task(name, rows, str(task.get("unit", "digit")), counts)


def _row(row: Mapping[str, Any], figures: tuple[str, ...], blind: frozenset[str]) -> Row:
    if row["question"] not in QUESTIONS:
        raise ValueError(f"question is {row['question']!r}")
    held = row.get("held")
    return Row(
        policy=str(row["policy"]),
        question=row["question"],
        same=bool(row["same_either_way"]),
        scored=not row["same_either_way"]
        and (row["question"] == "known" or row["policy"] not in blind),
        column=int(row["length"]) if "length" in row else str(row["dataset"]),
        figures={name: _estimate(row[name]) for name in figures},
        held=None if held is None else float(held),
        cells=tuple(
            Cell(
                depth=_finite(cell["depth"]),
                width=_finite(cell["width"]),
                count=int(cell["count"]),
                figures={name: _finite(cell[name]) for name in ("exact", "digit")},
            )
            for cell in row.get("cells", ())
        ),
    )


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return Estimate(*(_finite(found[name]) for name in ("value", "low", "high")))


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a figure is {value!r}")
    return number
