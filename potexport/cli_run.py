"""The command that reads and answers; `cli` adds it to its group."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potexport.cli_parts import COUNT, as_json, print_json
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
@click.option("--system", metavar="TEXT", help="System prompt, pinned: it stays however much is "
              "read. Default: the chat template's, not pinned.")  # fmt: skip
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
@click.option("--keep-mass", type=float, metavar="SHARE",
              help="Of the attention, for --keep auto. [0.95]")  # fmt: skip
@click.option("--save", type=click.Path(), metavar="PATH", help="Keep what was read in this file, "
              "before the question. Without a question nothing is answered.")  # fmt: skip
@click.option("--load", type=click.Path(), metavar="PATH", help="Go on from such a file: nothing "
              "is read again. PROMPT is the question.")  # fmt: skip
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
    sampling = _sampling(given, stop)
    document, question, scores = _what_to_read(prompt, file, question, more=loads, alone=alone)
    session = _opened(bundle, load, save, given)
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
            on_head=_pinning(session, system, tell=not json),
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


def _sampling(given: dict[str, Any], stop: tuple[str, ...]) -> Sampling:
    """Takes its settings out of those given; what cannot work is refused now, not after a book."""
    from potexport.runtime.sampling import Sampling
    from potexport.runtime.text import StopStrings

    names = ("temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: given.pop(name) for name in names})
    StopStrings(stop)
    return sampling


def _opened(bundle: Path, load: str | None, save: str | None, given: dict[str, Any]) -> Session:
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


def _pinning(session: Session, system: str | None, *, tell: bool) -> Callable[[], object]:
    """What is done when all that stands before the text was read. A system prompt that is too long
    to stay is read as any text is."""
    from potexport import progress

    def pin() -> None:
        try:
            session.pin()
        except PotexportError as error:
            if tell:
                progress.note_unpinned(error)

    return (lambda: None) if system is None else pin


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
