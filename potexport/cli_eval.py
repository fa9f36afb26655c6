"""The command that measures quality; `cli` adds it to its group."""

from __future__ import annotations

import json as jsonlib
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from potexport.cli_parts import adapter, as_json
from potexport.errors import PotexportError

COUNT = click.IntRange(min=1)
NAMES = ("task", "policy", "question", "length")


@click.command(name="eval", short_help="What is lost by keeping so little.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(), metavar="PATH", help="UTF-8 prose, a novel or so, for "
              "needle, hit-rate and perplexity.")  # fmt: skip
@click.option("--data", multiple=True, metavar="FILE", help="Records as LongBench stores them, "
              ".jsonl, for qa and summary; or org/name[:config] of the hub.")  # fmt: skip
@click.option("--model", help="What the bundle was built from: read with its whole cache beside "
              "the policies, and for hit-rate.")  # fmt: skip
@adapter
@click.option("--task", multiple=True, metavar="NAME", help="needle, hit-rate, perplexity, qa or "
              "summary; repeatable. Default: all that there is input for.")  # fmt: skip
@click.option("--policy", multiple=True, metavar="LABEL", help="Of the bundle; repeatable. "
              "Default: all.")  # fmt: skip
@click.option("--question", multiple=True, type=click.Choice(["known", "unknown"]),
              help="Whether the question scores the pot while a document is read. Default: "
              "both.")  # fmt: skip
@click.option("--length", multiple=True, type=COUNT, metavar="TOKENS", help="Of a document; "
              "repeatable. Default: two pots.")  # fmt: skip
@click.option("--documents", type=COUNT, default=8, help="Of each length. [8]")
@click.option("--limit", type=COUNT, metavar="RECORDS", help="Of each --data. Default: all.")
@click.option("--keep", type=COUNT, metavar="SLOTS", help="That every compression keeps. Default: "
              "the bundle's.")  # fmt: skip
@click.option("--catalyst", metavar="TEXT", help="Scores the pot where the question is unknown. "
              "Default: the bundle's; nothing, where a policy can do without.")  # fmt: skip
@click.option("--max-new-tokens", type=COUNT, metavar="TOKENS", help="Longest answer of qa and "
              "summary. Default: the dataset's.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0,
              help="Of documents, needles and intervals. [0]")  # fmt: skip
@click.option("--threads", type=COUNT, help="Default: one for each core.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Also write the JSON there; `potexport report` reads it.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model's "
              "repository brings along. Default: never.")  # fmt: skip
@as_json
def evaluate(bundle: Path, output: Path | None, json: bool, **given: Any) -> None:
    """Measure what BUNDLE still knows of what it read, by each of its policies, at equal memory.

    \b
    potexport eval BUNDLE --text novel.txt --model MODEL
    potexport eval BUNDLE --data hotpotqa.jsonl --limit 50 --question known
    """
    from potexport import show_eval
    from potexport.evaluation.run import evaluate as run
    from potexport.evaluation.settings import MODES, Settings

    lists = {name: _listed(given.pop(name)) for name in NAMES}
    settings = Settings(
        bundle=bundle,
        tasks=lists["task"],
        policies=lists["policy"],
        questions=tuple(m for m in MODES if m in lists["question"]) or MODES,
        lengths=lists["length"],
        **given,
    )
    if output is not None:
        _check_output(output)
    with show_eval.Progress(quiet=json) as telling:
        found = run(settings, on_progress=telling)
    written = jsonlib.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if output is not None:
        _write(output, written)
    if json:
        click.echo(written, nl=False)
    else:
        show_eval.tables(found)


def _listed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each once, in order; texts are cut at commas, but not inside a label."""
    parts: list[Any] = []
    for value in values:
        parts += [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
    return tuple(dict.fromkeys(part for part in parts if part != ""))


def _check_output(path: Path) -> None:
    """Said before an hour of work, not after."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise PotexportError(
            f"cannot write {path}: it is a folder, or there is none to hold it; choose another "
            "--output"
        )


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise PotexportError(
            f"cannot write {path}: {error.strerror}; choose another --output"
        ) from error
