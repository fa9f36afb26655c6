"""The command that shows; `cli` adds it to its group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potexport.cli_parts import as_json, print_json
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from potexport.reporting.trace import Trace

TOKENS, ANSWER = 4096, 48  # of the text, of the longest answer


@click.command(short_help="One HTML page: figures, and what was kept of a text.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
              help="The page, one file that loads nothing.")  # fmt: skip
@click.option("--eval", "evals", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="Written by `potexport eval --output`; may be given more than "
              "once.")  # fmt: skip
@click.option("--text", type=click.Path(), metavar="PATH",
              help="UTF-8 text to read and to show by what was kept.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1, 32768), metavar="TOKENS",
              help="So much of --text. [4096]")  # fmt: skip
@click.option("--question", metavar="TEXT", help="Asked behind the text, and scores the pot.")
@click.option("--blind", is_flag=True, help="The question is asked and does not score the pot: "
              "the bundle's own instruction does.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, metavar="LABEL", help="Read by this policy of "
              "the bundle; may be given more than once. Default: all.")  # fmt: skip
@click.option("--mark", "marks", multiple=True, metavar="WORDS", help="Words to mark in the text, "
              "such as the answer; may be given more than once.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="TOKENS",
              help="Longest answer. [48]")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each core.")
@as_json
def report(
    bundle: Path,
    output: Path,
    evals: tuple[Path, ...],
    text: str | None,
    tokens: int | None,
    question: str | None,
    blind: bool,
    policies: tuple[str, ...],
    marks: tuple[str, ...],
    max_new_tokens: int | None,
    threads: int | None,
    json: bool,
) -> None:
    """Write a page about BUNDLE: what `potexport eval` measured, and a text with every token shaded
    by how many heads still hold it.

    \b
    potexport report BUNDLE --eval eval.json -o report.html
    potexport report BUNDLE --text novel.txt --question "Whom does she marry?" -o report.html
    """
    from potexport import bundle as bundles
    from potexport import show
    from potexport.reporting import evals as measurements
    from potexport.reporting import page

    reads_other = tokens or policies or marks or max_new_tokens
    _check_asked(evals, text, question, blind=blind, other=reads_other)
    manifest = bundles.read(bundle)
    labels = [manifest.policy_of(label).label for label in dict.fromkeys(policies)]
    labels = labels or [each.label for each in manifest.policies]
    page.check_output(output)
    measured = [measurements.read(path, manifest) for path in evals]
    told = None
    if text is not None:
        told = _trace(
            bundle, text, labels, question=question, known=not blind, tokens=tokens or TOKENS,
            answer=max_new_tokens or ANSWER, marks=marks, threads=threads, quiet=json,
        )  # fmt: skip
    size = page.write(output, page.render(bundle.absolute().name, manifest, measured, told))
    if json:
        found = {
            "report": str(output),
            "bytes": size,
            "measurements": [each.file for each in measured],
            "tokens": len(told.pieces) if told else 0,
            "policies": [each.to_json() for each in told.told] if told else [],
        }
        print_json(found)
    else:
        click.echo(f"{output}: {show.size(size)}; open it in a browser")


def _check_asked(
    evals: tuple[Path, ...], text: str | None, question: str | None, *, blind: bool, other: object
) -> None:
    if not evals and text is None:
        raise PotexportError(
            "there is nothing to report; give --eval with what potexport eval wrote, or --text FILE"
        )
    if text is None and (question is not None or other):
        raise click.UsageError(
            "There is no text for --question, --policy, --tokens, --mark or --max-new-tokens; give "
            "--text FILE."
        )
    if question == "":
        raise click.UsageError("The question is empty; omit it, or ask something.")
    if blind and question is None:
        raise click.UsageError("--blind is about a question; give --question, or omit --blind.")


def _trace(
    bundle: Path, text: str, labels: list[str], *, threads: int | None, quiet: bool, **asked: Any
) -> Trace:
    """Read the text once for each policy, with one session."""
    from potexport import progress
    from potexport.reporting.trace import Asked, trace
    from potexport.runtime.reading import Document
    from potexport.runtime.session import Session

    document = Document.open(text)
    session = Session.open(bundle, policy=labels, threads=threads)

    def on_policy(label: str) -> progress.Reading:
        if not quiet:
            click.echo(f"read with the policy {label}", err=True)
        return progress.Reading(session, quiet=quiet)

    return trace(session, Asked(document, **asked), policies=labels, on_policy=on_policy)
