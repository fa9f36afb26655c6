"""The command line: parsing, and the order of calls. What it prints looks as `show` decides.

Nothing heavy is imported before the command that needs it: `potexport --help` is instant.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from potexport import __version__, cli_bench, cli_build, cli_eval, cli_npu, cli_report
from potexport.cli_parts import COUNT, adapter, as_json, trust
from potexport.cli_parts import print_json as _print_json
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from potexport.runtime.reading import Document

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


@cli.command(short_help="Read a text of any length and answer.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(), metavar="PATH", help="Text to read, UTF-8; `-` is "
              "stdin, also read if it is piped and there is no --file and no PROMPT.")  # fmt: skip
@click.option("--question", metavar="TEXT", help="Asked behind the text, and scores the pot. "
              "PROMPT is the question if only --file is given.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="System prompt. Default: the chat template's.")
@click.option("--raw", is_flag=True, help="No chat template: continue the text. Special tokens "
              "that are written in it count.")  # fmt: skip
@click.option("--catalyst", metavar="TEXT", help="Scores the pot. Default: the question; "
              "without one, the bundle's own instruction.")  # fmt: skip
@click.option("--max-new-tokens", type=COUNT, default=256, metavar="TOKENS",
              help="Longest answer. [256]")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token. [0]")
@click.option("--top-k", type=int, default=0, metavar="TOKENS",
              help="Draw from this many tokens; 0 is off. [0]")  # fmt: skip
@click.option("--top-p", type=float, default=1.0, metavar="SHARE",
              help="Draw from the likeliest tokens of this share; 1 is off. [1]")  # fmt: skip
@click.option("--seed", type=int, help="Same seed, same answer. Default: a new one each time.")
@click.option("--stop", multiple=True, metavar="TEXT",
              help="End the answer before this text; may be given more than once.")  # fmt: skip
@click.option("--policy", metavar="LABEL", help="Of those that the bundle holds. Default: its "
              "first.")  # fmt: skip
@click.option("--keep", metavar="SLOTS|auto", help="Slots that a compression keeps; auto: as few "
              "as hold --keep-mass of the attention. Default: the bundle's.")  # fmt: skip
@click.option("--keep-mass", type=float, default=0.95, metavar="SHARE",
              help="Of the attention, for --keep auto. [0.95]")  # fmt: skip
@click.option("--threads", type=COUNT, help="Default: one for each core it may use.")
@click.option("--backend", default="auto", help="auto, npu or cpu. Auto takes the NPU if the "
              "bundle was compiled for this device's. [auto]")  # fmt: skip
@click.option("--no-check", is_flag=True,
              help="Compare the files' sizes only, not their SHA-256.")  # fmt: skip
@as_json
def run(
    bundle: Path,
    prompt: str | None,
    file: str | None,
    question: str | None,
    system: str | None,
    raw: bool,
    catalyst: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    policy: str | None,
    keep: str | None,
    keep_mass: float,
    threads: int | None,
    backend: str,
    no_check: bool,
    json: bool,
    **drawing: Any,
) -> None:
    """Read a text of any length into BUNDLE's pot, and answer or continue it.

    \b
    potexport run BUNDLE "What is a pot?"
    potexport run BUNDLE --file novel.txt --question "Whom does she marry?"
    """
    from potexport import progress, show
    from potexport.runtime import reading
    from potexport.runtime.sampling import Sampling
    from potexport.runtime.session import Session
    from potexport.runtime.text import StopStrings

    sampling = Sampling(**drawing)
    StopStrings(stop)  # refused now, not after a book
    document, question, scores = _what_to_read(prompt, file, question)
    session = Session.open(
        bundle, backend=backend, threads=threads, check=not no_check, policy=policy
    )
    if keep is not None:
        session.keep = "auto" if keep == "auto" else _number(keep)
    session.keep_mass = keep_mass
    session.check_keep()
    around = reading.frame(session.text, question=question, system=system, raw=raw)
    by = scores if catalyst is None else catalyst
    if by is not None and session.set_catalyst(by):
        progress.note_catalyst(session)
    with progress.Reading(session, quiet=json) as telling:
        reading.read(session, document, around, answer=max_new_tokens, on_progress=telling)
    tokens = []
    for token in session.generate(max_new_tokens=max_new_tokens, sampling=sampling, stop=stop):
        tokens.append(token)
        if not json:
            click.echo(token.text, nl=False)
    if json:
        _print_json(show.answer_json(session, tokens), indent=None)
    else:
        click.echo()
        progress.summary(session)


def _number(keep: str) -> int:
    try:
        return int(keep)
    except ValueError as error:
        raise click.UsageError(f"--keep is {keep!r}; give a number of slots, or auto.") from error


def _what_to_read(
    prompt: str | None, file: str | None, question: str | None
) -> tuple[Document, str | None, str | None]:
    """(what to read, what to ask behind it, what scores the pot)."""
    from potexport.runtime.reading import Document

    if file is not None and prompt is not None:
        if question is not None:
            raise click.UsageError(
                "Give PROMPT or --question with --file, not both: both would be asked."
            )
        question, prompt = prompt, None
    if question == "":
        raise click.UsageError("The question is empty; omit it, or ask something.")
    if prompt is not None:
        return Document.of(prompt), question, question
    if file is not None and file != "-":
        return Document.open(file), question, question
    stdin = sys.stdin.buffer
    if file == "-" or not stdin.isatty():
        return Document(stdin, name="standard input", size=None), question, question
    if question is None:
        raise click.UsageError("Nothing to read; give PROMPT or --file PATH, or pipe a text.")
    return Document.of(question), None, question


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
