"""The command that reads and answers; `cli` adds it to its group."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potexport.cli_parts import (
    answering,
    as_json,
    compressing,
    opened,
    opening,
    print_json,
    sampling_of,
)
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from potexport.runtime.reading import Document, Frame
    from potexport.runtime.sampling import Sampling
    from potexport.runtime.session import Session, Token


@click.command(short_help="Read a text of any length and answer.")
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
@answering
@compressing
@click.option("--save", type=click.Path(), metavar="PATH", help="Keep what was read in this file, "
              "before the question. Without a question nothing is answered.")  # fmt: skip
@click.option("--load", type=click.Path(), metavar="PATH", help="Go on from such a file: nothing "
              "is read again. PROMPT is the question.")  # fmt: skip
@opening
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
    save: str | None,
    load: str | None,
    json: bool,
    **given: Any,
) -> None:
    """Read a text of any length into BUNDLE's pot, and answer or continue it.

    \b
    potexport run BUNDLE "What is a pot?"
    potexport run BUNDLE --file novel.txt --question "Whom does she marry?"
    potexport run BUNDLE --file novel.txt --save novel.pot
    potexport run BUNDLE --load novel.pot "Whom does she marry?"
    """
    from potexport import progress, show
    from potexport.runtime import reading

    loads, alone = load is not None, save is not None and system is not None
    if loads and system is not None:
        raise click.UsageError("--system stands before what --load has read; give it to --save.")
    sampling = sampling_of(given, stop)
    document, question, scores = _what_to_read(prompt, file, question, more=loads, alone=alone)
    session = opened(bundle, load, save, given)
    if session.said is not None:
        raise PotexportError(
            f"{load} holds a conversation; go on with it by: potexport chat --load"
        )
    before, note = session.stats, session.note if loads else None
    if load is not None and not json:
        progress.note_loaded(session, load)
    around = reading.frame(session.text, question=question, system=system, raw=raw, note=note)
    by = scores if catalyst is None else catalyst
    if by is not None and session.set_catalyst(by):
        progress.note_catalyst(session)
    with progress.Reading(session, quiet=json) as telling:
        reading.read(
            session,
            document,
            around,
            answer=max_new_tokens,
            on_progress=telling,
            on_text=_saving(session, save, around, tell=not json),
            may_be_empty=alone or (loads and (question is not None or note != reading.BARE)),
        )
    tokens: list[Token] = []
    if save is None or question is not None:
        tokens = _answer(session, max_new_tokens, sampling, stop, tell=not json)
    if json:
        print_json(show.answer_json(session, tokens, before), indent=None)
    else:
        progress.summary(session, before)


def _answer(
    session: Session, limit: int, sampling: Sampling, stop: tuple[str, ...], *, tell: bool
) -> list[Token]:
    tokens = []
    for token in session.generate(max_new_tokens=limit, sampling=sampling, stop=stop):
        tokens.append(token)
        if tell:
            click.echo(token.text, nl=False)
    if tell:
        click.echo()
    return tokens


def _saving(
    session: Session, save: str | None, around: Frame, *, tell: bool
) -> Callable[[int], None]:
    """What is done when the text was read, so many tokens of it."""
    from potexport import progress

    def keep(read: int) -> None:
        if save is not None:
            session.note = around.note(session.note, read)
            session.save(save)
            if tell:
                progress.note_saved(session, Path(save))

    return keep


def _what_to_read(
    prompt: str | None, file: str | None, question: str | None, *, more: bool, alone: bool
) -> tuple[Document, str | None, str | None]:
    """(what to read, what to ask behind it, what scores the pot).

    more: it stands behind what was loaded, and need not be. alone: nor need it before a question
    that others will ask.
    """
    from potexport.runtime.reading import Document

    if prompt is not None and (file is not None or (more and question is None)):
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
    if file == "-" or not (more or stdin.isatty()):
        return Document(stdin, name="standard input", size=None), question, question
    if more or alone:
        return Document.of(""), question, question
    if question is None:
        raise click.UsageError("Nothing to read; give PROMPT or --file PATH, or pipe a text.")
    return Document.of(question), None, question
