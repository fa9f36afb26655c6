"""What the files of the command line share."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
COUNT = click.IntRange(min=1)


def as_json(function: Function) -> Function:
    return click.option(
        "--json", is_flag=True, help="Print one JSON object on stdout and nothing else."
    )(function)


def trust(function: Function) -> Function:
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that the model's repository brings along. Default: never.",
    )(function)


def adapter(function: Function) -> Function:
    return click.option(
        "--adapter",
        multiple=True,
        metavar="FOLDER|ID",
        help="LoRA adapter of the model, a folder or a hub id, merged into the weights; may be "
        "given more than once.",
    )(function)


def print_json(document: object, indent: int | None = 1) -> None:
    click.echo(jsonlib.dumps(document, indent=indent))
