"""What to evaluate, and how its progress is told."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potexport.errors import PotexportError

Mode = Literal["known", "unknown"]
MODES: tuple[Mode, ...] = ("unknown", "known")
TASKS = ("needle", "hit-rate", "perplexity", "qa", "summary")
OF_TEXT = TASKS[:3]  # read --text; the others read --data
BASELINES = ("full", "oracle", "truncation")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """All that was asked for; empty where a default is to be found.

    text: a file of prose. data: files of LongBench's form, or hub ids. model: what the bundle was
    built from. adapter: merged into it. catalyst: scores the pot where the question is unknown;
    the bundle's if None.
    """

    bundle: Path
    tasks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    questions: tuple[Mode, ...] = MODES
    lengths: tuple[int, ...] = ()
    documents: int = 8
    seed: int = 0
    text: str | None = None
    data: tuple[str, ...] = ()
    model: str | None = None
    adapter: tuple[str, ...] = ()
    limit: int | None = None
    keep: int | None = None
    catalyst: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    trust_remote_code: bool = False

    @property
    def command(self) -> str:
        """What a person types for the same figures; files by name."""
        words = ["potexport", "eval", self.bundle.resolve().name]

        def add(option: str, *values: object) -> None:
            for value in values:
                words.extend((f"--{option}", str(value)))

        add("text", *[Path(self.text).name] if self.text else [])
        add("data", *(each if not Path(each).exists() else Path(each).name for each in self.data))
        add("model", *[self.model.rstrip("/").rsplit("/", 1)[-1]] if self.model else [])
        add("adapter", *(each.rstrip("/").rsplit("/", 1)[-1] for each in self.adapter))
        add("task", *self.tasks)
        add("policy", *self.policies)
        add("question", *self.questions if self.questions != MODES else ())
        add("length", *self.lengths)
        add("documents", self.documents)
        for option in ("limit", "keep", "catalyst", "max_new_tokens"):
            value = getattr(self, option)
            add(option.replace("_", "-"), *[] if value is None else [value])
        add("seed", self.seed)
        return shlex.join(words)

    def wanted(self) -> tuple[str, ...]:
        """Which tasks to do, in the order of TASKS; those of --data are found out from its records.

        Raises PotexportError for a task that lacks what it reads.
        """
        asked = self.tasks
        for task in asked:
            if task not in TASKS:
                raise PotexportError(
                    f"there is no task {task!r} among those of eval; choose one of: "
                    f"{', '.join(TASKS)}"
                )
        of_text = [task for task in OF_TEXT if task in asked]
        of_data = [task for task in asked if task not in OF_TEXT]
        if not (self.text or self.data):
            raise PotexportError(
                "there is nothing to evaluate on; give --text FILE for needle, perplexity and "
                "hit-rate, or --data FILE for qa and summary"
            )
        if of_text and not self.text:
            raise PotexportError(f"the task {of_text[0]} needs prose; give --text FILE")
        if of_data and not self.data:
            raise PotexportError(
                f"the task {of_data[0]} needs records as LongBench stores them; give --data FILE"
            )
        if "hit-rate" in asked and not self.model:
            raise PotexportError(
                "the task hit-rate needs the attention of the untouched model; give --model MODEL"
            )
        if self.adapter and not self.model:
            raise PotexportError("an --adapter is of a model; give --model MODEL, or omit it")
        if self.text and not of_text and not of_data:
            of_text = [task for task in OF_TEXT if self.model or task != "hit-rate"]
        if self.data and not of_data and not asked:
            of_data = ["qa", "summary"]
        return tuple(task for task in TASKS if task in of_text or task in of_data)
