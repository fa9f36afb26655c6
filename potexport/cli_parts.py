"""What the files of the command line share."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def as_json(function: Function) -> Function:
    return click.option(
        "--json", is_flag=True, help="Print one JSON object on stdout and nothing else."
    )(function)


def print_json(document: object, indent: int | None = 1) -> None:
    click.echo(jsonlib.dumps(document, indent=indent))
