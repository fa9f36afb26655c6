"""What the files of the command line share."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from potexport.runtime.sampling import Sampling
    from potexport.runtime.session import Session

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


def _all(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Options as one, in this order."""

    def every(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return every


# fmt: off
# How an answer is drawn.
answering = _all(
    click.option("--max-new-tokens", type=COUNT, default=256, metavar="TOKENS",
                 help="Longest answer. [256]"),
    click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token. [0]"),
    click.option("--top-k", type=int, default=0, metavar="TOKENS",
                 help="Draw from this many tokens; 0 is off. [0]"),
    click.option("--top-p", type=float, default=1.0, metavar="SHARE",
                 help="Draw from the likeliest tokens of this share; 1 is off. [1]"),
    click.option("--seed", type=int, help="Same seed, same answer. Default: a new one each time."),
    click.option("--stop", multiple=True, metavar="TEXT",
                 help="End the answer before this text; may be given more than once."),
)

# What a compression keeps.
compressing = _all(
    click.option("--policy", metavar="LABEL", help="Of those that the bundle holds. Default: its "
                 "first."),
    click.option("--keep", metavar="SLOTS|auto", help="Slots that a compression keeps; auto: as "
                 "few as hold --keep-mass of the attention. Default: the bundle's."),
    click.option("--keep-mass", type=float, metavar="SHARE",
                 help="Of the attention, for --keep auto. [0.95]"),
)

# How a bundle is opened.
opening = _all(
    click.option("--threads", type=COUNT, help="Default: one for each core it may use."),
    click.option("--backend", default="auto", help="auto, npu or cpu. Auto takes the NPU if the "
                 "bundle was compiled for this device's. [auto]"),
    click.option("--no-check", is_flag=True,
                 help="Compare the files' sizes only, not their SHA-256."),
)
# fmt: on


def sampling_of(given: dict[str, Any], stop: tuple[str, ...]) -> Sampling:
    """Takes its settings out of those given; what cannot work is refused now, not after a book."""
    from potexport.runtime.sampling import Sampling
    from potexport.runtime.text import StopStrings

    names = ("temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: given.pop(name) for name in names})
    StopStrings(stop)
    return sampling


def opened(bundle: Path, load: str | None, save: str | None, given: dict[str, Any]) -> Session:
    from potexport.runtime.saved import check_place
    from potexport.runtime.session import Session

    if save is not None:
        check_place(save)
    keep, share = given.pop("keep"), given.pop("keep_mass")
    session = Session.open(bundle, check=not given.pop("no_check"), saved=load, **given)
    if keep is not None:
        session.keep = "auto" if keep == "auto" else _number(keep)
    if share is not None:
        session.keep_mass = share
    session.check_keep()
    return session


def _number(keep: str) -> int:
    try:
        return int(keep)
    except ValueError as error:
        raise click.UsageError(f"--keep is {keep!r}; give a number of slots, or auto.") from error
