"""Records as LongBench stores them: what is read, and which line is refused with which words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from potexport.errors import PotexportError
from potexport.evaluation import longbench

BOTH = ("qa", "summary")
RECORD: dict[str, Any] = {
    "input": "Who minds the dog?",
    "context": "The dog, who is called Rex, does not mind at all.",
    "answers": ["nobody", "no one"],
    "length": 10,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


def write(path: Path, *records: object) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def read(*sources: str, tasks: tuple[str, ...] = BOTH, **more: Any) -> list[longbench.Record]:
    return longbench.read(sources, tasks=tasks, **{"limit": None, "most": None, **more})


def test_records_are_read_in_order(tmp_path: Path) -> None:
    report = {**RECORD, "dataset": "gov_report_e", "input": ""}
    path = write(tmp_path / "a.jsonl", RECORD, report)
    first, second = read(path)
    assert (first.task, first.dataset, first.most) == ("qa", "hotpotqa", 32)
    assert (first.answers, first.known) == (("nobody", "no one"), RECORD["input"])
    assert first.question.endswith(RECORD["input"])
    assert (second.task, second.dataset, second.most) == ("summary", "gov_report", 512)
    assert second.known == second.question


def test_a_task_leaves_the_other_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORD, {**RECORD, "dataset": "multi_news"}, RECORD)
    assert [each.dataset for each in read(path, tasks=("summary",))] == ["multi_news"]
    assert len(read(path, tasks=("qa",), limit=1)) == 1


def test_one_task_decides_for_unknown_datasets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**RECORD, "dataset": "mine"})
    (record,) = read(path, tasks=("qa",), most=7)
    assert (record.task, record.dataset, record.most) == ("qa", "mine", 7)
    with pytest.raises(PotexportError, match=r"line 1 of a\.jsonl is of the dataset 'mine'"):
        read(path)


def test_empty_lines_count_but_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(RECORD)}\n\n{{\n", encoding="utf-8")
    with pytest.raises(PotexportError, match=r"line 4 of a\.jsonl is not JSON"):
        read(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": ""}, "has no context"),
        ({"context": 3}, "has no context"),
        ({"input": None}, "has no input"),
        ({"input": " "}, "has an empty input"),
        ({"answers": []}, "has no answers"),
        ({"answers": "nobody"}, "has no answers"),
        ({"answers": [1]}, "has no answers"),
        ({"language": "zh"}, "is in the language 'zh'"),
        ({"dataset": "lcc"}, "is of the dataset 'lcc'"),
        ({"dataset": None}, "is of the dataset ''"),
    ],
)
def test_what_is_no_record_names_its_line(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = write(tmp_path / "bad.jsonl", RECORD, {**RECORD, **change})
    with pytest.raises(PotexportError, match=r"line 2 of bad\.jsonl") as caught:
        read(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("line", [b"[1, 2]", b'"text"', b"\xff\xfe", b"{", b"[" * 100_000])
def test_no_bytes_end_in_a_traceback(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(PotexportError, match=r"line 1 of bad\.jsonl"):
        read(str(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PotexportError, match="cannot be read"):
        read(str(tmp_path / "none.jsonl"))
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(PotexportError, match=r"no record of qa or summary in empty\.jsonl"):
        read(empty)


def test_only_the_first_line_of_some_answers_counts() -> None:
    row = {**RECORD, "dataset": "triviaqa"}
    record = longbench.parse(row, "line 1", tasks=BOTH)
    assert record is not None
    assert record.taken("\nRex\nQuestion: who?") == "Rex"


class Hub:
    """A stand-in for the package `datasets`."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows = rows
        self.asked: tuple[object, ...] = ()

    def load_dataset(self, *arguments: object, split: str) -> list[dict[str, Any]]:
        self.asked = (*arguments, split)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([RECORD, RECORD])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(read("someone/long:hotpotqa", limit=1)) == 1
    assert hub.asked == ("someone/long", "hotpotqa", "test")


def test_a_hub_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(OSError("no network\nat all")))
    with pytest.raises(PotexportError, match=r"someone/long cannot be had .*\(no network\)"):
        read("someone/long")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PotexportError, match="needs the package datasets"):
        read("someone/long")
