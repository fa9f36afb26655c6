"""The command line: parsing, and the order of calls. What it prints looks as `show` decides.

Nothing heavy is imported before the command that needs it: `potexport --help` is instant.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from potexport import (
    __version__,
    cli_bench,
    cli_build,
    cli_chat,
    cli_eval,
    cli_npu,
    cli_report,
    cli_run,
    cli_serve,
    cli_web,
)
from potexport.cli_parts import COUNT, adapter, as_json, trust
from potexport.cli_parts import print_json as _print_json
from potexport.errors import PotexportError

# What a person can cause and cure; any other OSError is a bug and shows its traceback.
CURABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
    | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.EMFILE}
)


class Commands(click.Group):
    """A group whose mistakes end in one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.Abort:  # Ctrl-C
            click.echo("potexport: interrupted", err=True)
            sys.exit(130)
        except click.UsageError as error:
            hint = f" See {error.ctx.command_path} --help" if error.ctx else ""
            _fail(error.format_message() + hint)
        except click.ClickException as error:
            _fail(error.format_message())
        except PotexportError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in CURABLE:
                raise
            _fail(f"{error.filename or 'a file'}: {error.strerror}")
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"potexport: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="potexport")
def cli() -> None:
    """Export language models to static-shape graphs that read without end in constant memory."""


@cli.command(short_help="Show a bundle's geometry, memory and files.")
@click.argument("bundle", type=click.Path(path_type=Path))
@as_json
def inspect(bundle: Path, json: bool) -> None:
    """Show BUNDLE's geometry, memory, inputs and outputs, and files."""
    from potexport import bundle as bundles
    from potexport import show

    manifest = bundles.read(bundle)
    bundles.check_files(bundle, manifest, digests=False)
    _print_json(show.bundle_json(manifest)) if json else show.bundle(bundle, manifest)


@cli.command(short_help="Compare a bundle with PyTorch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="What the bundle was built from.")
@adapter
@click.option("--text", type=click.Path(), metavar="PATH",
              help="UTF-8 text to read. Default: random tokens.")  # fmt: skip
@click.option("--question", metavar="TEXT",
              help="Asked behind the text on an emulated NPU; scores the pot.")  # fmt: skip
@click.option("--compressions", type=COUNT,
              help="To compare past the pot. Default: 10, on an emulator 3.")  # fmt: skip
@click.option("--steps", type=COUNT, metavar="TOKENS",
              help="To generate. Default: 64, on an emulator 24.")  # fmt: skip
@click.option("--soc", metavar="CHIP", help="To emulate. Default: the bundle's first.")
@trust
@as_json
def verify(
    bundle: Path,
    text: str | None,
    json: bool,
    **given: Any,
) -> None:
    """Compare BUNDLE with PyTorch on the same tokens; exit code 1 if a check fails."""
    from potexport import parity, pipeline, progress, show
    from potexport.runtime.reading import Document

    pipeline.require_export_packages()
    content = None if text is None else "".join(Document.open(text).blocks())
    with progress.Stages(quiet=json) as stages:
        report = parity.verify(bundle, text=content, on_stage=stages, **given)
    _print_json(report.to_json()) if json else show.report(report)
    click.get_current_context().exit(0 if report.passed else 1)


@cli.command()
@as_json
def targets(json: bool) -> None:
    """List the targets: where a bundle can run, and how far that was proven."""
    from potexport import show, targets

    found = [target.to_json() for target in targets.every()]
    _print_json(found) if json else show.targets(found)


@cli.command()
@as_json
def models(json: bool) -> None:
    """List the families of models: what was proven of each and where, and what is refused."""
    from potexport import show_models

    found = show_models.found()
    _print_json(found) if json else show_models.models(found)


cli.add_command(cli_run.run)
cli.add_command(cli_serve.serve)
cli.add_command(cli_chat.chat)
cli.add_command(cli_web.web)
cli.add_command(cli_build.build)
cli.add_command(cli_build.policies)
cli.add_command(cli_eval.evaluate)
cli.add_command(cli_report.report)
cli.add_command(cli_bench.bench)
cli.add_command(cli_npu.coverage)
cli.add_command(cli_npu.push)


def main() -> None:
    """The entry point of the command `potexport`."""
    cli.main(prog_name="potexport")
