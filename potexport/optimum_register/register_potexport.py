"""`optimum-cli export potexport`: `potexport build` under optimum's command line.

optimum looks for such files in its namespace package `optimum.commands.register`, to which
pyproject.toml adds this folder (which therefore has no __init__.py). Options and their help are
read off the click command, which also checks them and does the work.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from functools import partial
from typing import Any, NoReturn

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from potexport.cli import cli
from potexport.cli_build import build


class PotexportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    COMMAND = CommandInfo("potexport", help=build.short_help)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description, parser.allow_abbrev = build.help, False
        parser.error = _refuse  # type: ignore[method-assign]
        parser.parse_known_args = partial(_all_known, parser)  # type: ignore[method-assign]
        parser.add_argument("-m", "--model", required=True, help="What to make it from.")
        context = click.Context(build)
        for option in build.params:
            if isinstance(option, click.Option):
                _, text = option.get_help_record(context) or ("", "")
                kind: dict[str, Any] = {"action": "append" if option.multiple else "store"}
                if option.is_flag:
                    kind["action"] = "store_true"
                else:
                    kind["metavar"] = option.make_metavar(context)
                parser.add_argument(
                    *option.opts,
                    dest=option.name,
                    default=SUPPRESS,
                    help=text.replace("%", "%%"),
                    **kind,
                )

    def run(self) -> None:
        given = vars(self.args)
        words = [given["model"]]
        for option in build.params:
            value = given.get(str(option.name)) if isinstance(option, click.Option) else None
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    words.append(option.opts[-1] if each is True else f"{option.opts[-1]}={each}")
        cli.main(["build", *words], prog_name="potexport")


def _all_known(parser: ArgumentParser, *words: Any) -> tuple[Any, list[str]]:
    """What is unknown is refused in one line, and not passed up to optimum's own parser."""
    found, unknown = ArgumentParser.parse_known_args(parser, *words)
    if unknown:
        _refuse(f"unrecognized arguments: {' '.join(unknown)}")
    return found, unknown


def _refuse(message: str) -> NoReturn:
    click.echo(f"potexport: {message}. See optimum-cli export potexport --help", err=True)
    raise SystemExit(2)


REGISTER_COMMANDS = [(PotexportCommand, ExportCommand)]
