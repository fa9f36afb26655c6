"""Records of long-context tasks, as LongBench stores them: one JSON object a line.

Decides what a record must have, which task and which longest answer belong to a dataset, and with
which words a question is asked. It scores nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potexport.errors import PotexportError

# Dataset -> the longest answer in tokens. Source: arXiv 2308.14508 (LongBench), its settings.
QA = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "triviaqa": 32,
}
SUMMARY = {"gov_report": 512, "qmsum": 512, "multi_news": 512}
LIMITS: Mapping[str, Mapping[str, int]] = {"qa": QA, "summary": SUMMARY}
# What follows a question in the model's answer is no part of it: only the first line counts.
FIRST_LINE = frozenset({"triviaqa"})


@dataclass(frozen=True)
class Record:
    """One task. question: what is asked behind the context; known: what scores the pot where the
    question is known; most: tokens of the longest answer."""

    task: str
    dataset: str
    context: str
    question: str
    known: str
    answers: tuple[str, ...]
    most: int

    def taken(self, answer: str) -> str:
        """The part of an answer that is scored."""
        return answer.strip().partition("\n")[0] if self.dataset in FIRST_LINE else answer


def read(
    sources: Sequence[str], *, tasks: tuple[str, ...], limit: int | None, most: int | None
) -> list[Record]:
    """The first `limit` records of each source: a .jsonl file, or a hub id org/name[:config].

    Args:
        tasks: "qa", "summary" or both. One alone also decides for datasets of unknown name, and
            records of the other are left out.
        most: tokens of the longest answer; the dataset's own by default.

    Raises PotexportError, with the file and the line, for what is no such record.
    """
    found = []
    for source in sources:
        rows = _file(Path(source)) if Path(source).exists() or not _is_hub(source) else _hub(source)
        taken = 0
        for where, row in rows:
            if limit is not None and taken >= limit:
                break
            record = parse(row, where, tasks=tasks, most=most)
            if record is not None:
                found.append(record)
                taken += 1
    if sources and not found:
        names = ", ".join(Path(source).name for source in sources)
        raise PotexportError(f"there is no record of {' or '.join(tasks)} in {names}; give others")
    return found


def parse(
    row: Any, where: str, *, tasks: tuple[str, ...], most: int | None = None
) -> Record | None:
    """One record; None for a task that was not asked for."""
    if not isinstance(row, dict):
        raise PotexportError(f"{where} holds a {type(row).__name__}; expected a JSON object")
    context, asked = _text(row, "context", where), _text(row, "input", where, empty=True)
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise PotexportError(f"{where} has no answers; expected a list of texts")
    dataset = str(row.get("dataset") or "").removesuffix("_e")
    if str(row.get("language") or "en") != "en":
        raise PotexportError(
            f"{where} is in the language {row['language']!r}, whose words potexport cannot tell "
            "apart; give English records"
        )
    task = next((name for name, known in LIMITS.items() if dataset in known), None)
    if task is None and len(tasks) == 1:
        task = tasks[0]
    if task is None:
        raise PotexportError(
            f"{where} is of the dataset {dataset!r}, which is not known to be qa or summary; give "
            "--task qa or --task summary alone"
        )
    if task not in tasks:
        return None
    if task == "qa" and not asked.strip():
        raise PotexportError(f"{where} has an empty input; expected the question")
    return Record(
        task=task,
        dataset=dataset or task,
        context=context,
        question=_question(task, asked),
        known=asked.strip() or _question(task, asked),
        answers=tuple(answers),
        most=most or LIMITS[task].get(dataset, 64 if task == "qa" else 512),
    )


def _question(task: str, asked: str) -> str:
    """The words behind a context. Differs from LongBench's own prompts, which stand before it too:
    there they would be read and dropped."""
    asked = asked.strip()
    if task == "qa":
        return f"Answer this question from the text above, in as few words as you can: {asked}"
    if asked:
        return f"Answer this from the text above, in one paragraph: {asked}"
    return "Write a summary of the text above, in one page at most."


def _text(row: Mapping[str, Any], name: str, where: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise PotexportError(f"{where} has no {name}; expected a text, as LongBench stores it")
    return value


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, the object on it), empty lines left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"line {number} of {path.name}"
                if line.strip():
                    yield where, _json(line, where)
    except OSError as error:
        raise PotexportError(f"{path} cannot be read: {error.strerror}") from error


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PotexportError(
            f"{where} is not JSON ({_line(error)}); expected one object a line, as "
            "LongBench stores them"
        ) from error


def _is_hub(source: str) -> bool:
    """org/name or org/name:config, and no file."""
    name = source.partition(":")[0]
    return name.count("/") == 1 and not name.endswith((".jsonl", ".json")) and name[0] not in "./~"


def _hub(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PotexportError(
            f"{source} is no file, and a dataset of the hub needs the package datasets, which is "
            "not installed; install it with: pip install datasets, or give a .jsonl file"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split="test")
    except Exception as error:  # its own kinds, the hub's, and whatever a network raises
        raise PotexportError(
            f"{source} cannot be had from the hub ({_line(error)}); check the name "
            "and the network, or give a .jsonl file"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"record {number} of {source}", dict(row)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
