"""The command that talks; `cli` adds it to its group.

A line is a turn, or a command with a slash. On a terminal the standard library edits lines; with
`--json` both sides are JSON objects, one a line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json as jsonlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potexport.cli_parts import answering, compressing, opened, opening, print_json, sampling_of
from potexport.errors import PotexportError

if TYPE_CHECKING:
    from potexport.talking import Kept, Talk

PROMPT = "> "


class LeftError(Exception):
    """Nothing more will be said."""


@click.command(short_help="Talk, in turns of which nothing is read twice.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="System prompt, which no compression drops. "
              "Default: the chat template's.")  # fmt: skip
@click.option("--catalyst", metavar="TEXT", help="Scores the pot. Default: what was said last.")
@answering
@compressing
@click.option("--save", type=click.Path(), metavar="PATH",
              help="Keep the conversation in this file, anew after each answer.")  # fmt: skip
@click.option("--load", type=click.Path(), metavar="PATH",
              help="Go on from such a file: nothing is read again.")  # fmt: skip
@opening
@click.option("--json", is_flag=True, help='A line {"content": "…"} on stdin is a turn, a line '
              '{"command": "/pot"} a command; each has one JSON object on stdout.')  # fmt: skip
def chat(
    bundle: Path,
    system: str | None,
    catalyst: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    save: str | None,
    load: str | None,
    json: bool,
    **given: Any,
) -> None:
    """Talk with BUNDLE's model; what was said is in its pot, and is not read again.

    \b
    potexport chat BUNDLE --system "You are a librarian."
    potexport chat BUNDLE --save talk.pot
    potexport chat BUNDLE --load talk.pot --save talk.pot
    """
    from potexport import progress
    from potexport.talking import Talk

    if load is not None and system is not None:
        raise click.UsageError("--system stands before what --load has read; use /system.")
    sampling = sampling_of(given, stop)
    session = opened(bundle, load, save, given)
    talk = Talk(session, system=system, limit=max_new_tokens, sampling=sampling, stop=stop)
    talk.check()
    if load is not None:
        talk.check_loaded(load)
        if not json:
            progress.note_loaded(session, load)
    if catalyst is not None and session.set_catalyst(catalyst) and not json:
        progress.note_catalyst(session)
    shell = (JsonShell if json else Shell)(talk, save)
    if not json and sys.stdin.isatty():
        click.echo(f"{bundle}: /help lists commands, Ctrl-D leaves", err=True)
    with suppress(KeyboardInterrupt):  # the second one, as the first is being answered
        _loop(shell)
    shell.leave()


def _loop(shell: Shell) -> None:
    """Line after line, until the last; a second Ctrl-C in a row is one."""
    interrupted = False
    while True:
        try:
            line = shell.line()
            interrupted = False
            shell.take(line)
        except PotexportError as error:
            shell.refuse(str(error))
        except LeftError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            shell.note("Ctrl-C again, or Ctrl-D, leaves")


class Shell:
    """For people: text in, text out, what is not the model's on stderr."""

    def __init__(self, talk: Talk, save: str | None) -> None:
        self.talk, self._save = talk, save
        self._before = talk.session.stats
        self._edits = sys.stdin.isatty()
        if self._edits and importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # from now on `input` edits and remembers

    def line(self) -> str:
        """The next one; LeftError behind the last."""
        if self._edits:
            try:
                return input(PROMPT)
            except EOFError as error:
                click.echo(err=True)
                raise LeftError from error
        line = sys.stdin.buffer.readline()
        if not line:
            raise LeftError
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PotexportError(
                f"the line is not UTF-8 text ({error.reason}); convert it, for example with iconv"
            ) from error

    def take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self.command(line)
        elif line.strip():
            self.say(line[1:] if line.startswith("//") else line)

    def say(self, content: str) -> None:
        from potexport import progress

        with progress.Reading(self.talk.session, quiet=False) as reading:
            answer = self.talk.say(
                content,
                tell=lambda text: click.echo(text, nl=False),
                on_progress=reading,
                on_read=reading.end,
            )
        click.echo()
        if answer.stopped:
            self.note("stopped")
        self.saved()

    def saved(self) -> None:
        if self._save is not None:
            self.talk.save(self._save)

    def command(self, line: str) -> None:
        """Raises PotexportError for one that there is not, or that lacks what it needs."""
        from potexport.talking import Stop

        with Stop():  # a session is loaded whole, or not at all
            self._command(line)

    def _command(self, line: str) -> None:
        from potexport.talking import HELP

        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            raise LeftError
        if name in ("/save", "/load"):
            if not rest:
                raise PotexportError(f"{name} needs a PATH; write it behind the command")
            told = self.talk.save(rest) if name == "/save" else self.talk.load(rest)
            self.show(name, {"path": rest}, told)
        elif name == "/pot":
            self.show_pot(self.talk.pot())
        elif name == "/system":
            if rest:
                self.talk.begin_with(rest)
            system = self.talk.system
            told = "there is no system prompt" if system is None else system
            self.show(name, {"system": system}, told)
        elif name == "/reset":
            self.talk.reset()
            self.show(name, {}, "forgotten")
        elif name == "/help":
            self.show(name, {"help": HELP}, HELP)
        else:
            raise PotexportError(f"there is no command {name}; /help lists them")

    def show(self, name: str, facts: dict[str, Any], told: str) -> None:
        self.note(told)

    def show_pot(self, kept: Kept) -> None:
        from potexport import show_chat

        show_chat.kept(kept)

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def refuse(self, message: str) -> None:
        self.note(f"potexport: {' '.join(message.split())}")

    def leave(self) -> None:
        from potexport import progress

        progress.summary(self.talk.session, self._before)


class JsonShell(Shell):
    """For programs: an object a line, and for each one line."""

    def take(self, line: str) -> None:
        if not line.strip():
            return
        try:
            given = jsonlib.loads(line)
        except (ValueError, RecursionError) as error:
            raise PotexportError(
                f"the line is not JSON ({error}); give one object a line"
            ) from error
        match given:
            case {"content": str(content), **rest} if content and not rest:
                self.say(content)
            case {"command": str(command), **rest} if not rest:
                self.command(command)
            case _:
                raise PotexportError(
                    'the line is neither {"content": "…"}, with a text, nor {"command": "/…"}'
                )

    def say(self, content: str) -> None:
        from potexport import show

        session = self.talk.session
        before = session.stats
        answer = self.talk.say(content, tell=lambda text: None)
        self.saved()
        found = show.answer_json(session, answer.tokens, before)
        print_json({**found, "stopped": answer.stopped}, indent=None)

    def show(self, name: str, facts: dict[str, Any], told: str) -> None:
        print_json({"command": name, **facts}, indent=None)

    def show_pot(self, kept: Kept) -> None:
        self.show("/pot", kept.to_json(), "")

    def note(self, text: str) -> None:
        pass

    def refuse(self, message: str) -> None:
        print_json({"error": " ".join(message.split())}, indent=None)

    def leave(self) -> None:
        pass
