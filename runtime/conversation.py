"""A conversation with a session: what of it is new, and is read, and what of it was said already.

What is new is found by rendering the chat template with a mark in place of the last answer, and not
by comparing tokens: templates trim what they are given, and drop what was thought in earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from potexport.errors import ChatError, PotexportError
from potexport.runtime.control import Mask
from potexport.runtime.generating import check_limit, generated
from potexport.runtime.ids import Ids
from potexport.runtime.records import Token
from potexport.runtime.said import Plain, Said, plain_messages
from potexport.runtime.sampling import Sampler, Sampling
from potexport.runtime.template import Message, plain_data
from potexport.runtime.text import StopStrings, Text

if TYPE_CHECKING:
    from potexport.runtime.session import Session

SYSTEM = ("system", "developer")
LONG = 100_000  # characters of a message, into which no template looks
CATALYST_CHARACTERS = 32  # for each token that scores the pot; there are hardly longer ones


class Chat:
    """What `Session.chat` is: called with messages, it answers."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def messages(self) -> list[Plain]:
        """What was said, the last answer included, as far as it was shown: what the next call must
        begin with. Nothing, if something else was fed or generated since."""
        said = self._said()
        return [] if said is None else said.all

    def continues(self, messages: Sequence[Message], **variables: Any) -> bool:
        """Whether these messages go on from what was said, so that only what is new is read."""
        said = self._said()
        return said is not None and said.goes_on(plain_messages(messages), plain_data(variables))

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_progress: Callable[[int, int], None] | None = None,
        **variables: Any,
    ) -> Iterator[Token]:
        """Answer the last of the messages, token by token; they are read before this returns.

        `messages` is the whole conversation: a role and a content each, the session's own answers
        among them, as they were shown. If it goes on from what was said (`continues`), only what is
        new is read. If not, or if something else was fed since, the session forgets all that it has
        read and reads all of it: `stats` then counts from nothing again. A system prompt at the
        beginning is pinned, unless it is too long for that (`pinned` says).

        An answer may be left at any token. What was shown of it was said, and the next call
        ends it as the template does. The tokens of a stop string stay in the pot, though they were
        not shown. Control tokens' names in messages are read as letters.

        Args:
            on_progress: as for `Session.feed`. What it raises ends the reading; the next call goes
                on from there if the messages hold an empty answer.
            variables: of the template, such as `tools` or `enable_thinking`. Others than before
                begin anew.
        Raises ChatError, and leaves the session as it was, for messages that are none, and for
        what the template refuses; another PotexportError for graphs that fail, and from the
        iterator, if the session has gone on without it.
        """
        session = self._session
        try:
            check_limit(max_new_tokens)
            sampler, stops = Sampler(sampling or Sampling()), StopStrings(stop)
            new, given = plain_messages(messages), plain_data(variables)
            ids, first, goes_on = self._new(new, given)
        except PotexportError as error:
            raise ChatError(*error.args) from error
        if not goes_on:
            session.reset()
            self._pin(ids[:first])
        rest = ids[first:]
        self._score_by(new[-1])
        session.said = Said(tuple(new), given, "", session.length + rest.size)
        session.feed(rest, to_come=max_new_tokens, on_progress=on_progress)
        return self._answer(session.said, max_new_tokens, sampler, stops)

    def _new(self, messages: list[Plain], variables: Plain) -> tuple[Ids, int, bool]:
        """(ids of what is to be read, how many of them are to be pinned, whether it goes on)."""
        said, text = self._said(), self._session.text
        if said is not None and said.goes_on(messages, variables):
            rest = following(text, messages, len(said.messages), variables)
            if rest is not None:
                return rest, 0, True
        return *opening(text, messages, variables), False

    def _said(self) -> Said | None:
        said = self._session.said
        return said if said is not None and said.length == self._session.length else None

    def _pin(self, ids: Ids) -> None:
        """Feed what no compression is to drop, if the pot has room for it beside the rest."""
        self._session.feed(ids)
        if ids.size:
            with suppress(PotexportError):
                self._session.pin()

    def _score_by(self, message: Plain) -> None:
        """The last message scores the pot, as a question does, unless somebody set the catalyst."""
        session = self._session
        most = CATALYST_CHARACTERS * session.manifest.pot.catalyst_width
        asked = message.get("content", "")[-most:]
        session.set_catalyst(session.text.encode(asked, trusted=False), default=True)

    def _answer(
        self, said: Said, limit: int, sampler: Sampler, stops: StopStrings
    ) -> Iterator[Token]:
        session = self._session
        # The end token is the template's to write, in the next turn.
        answer = generated(session, limit, sampler, stops, takes_end=False)
        while True:
            if session.said is not said or said.length != session.length:
                raise PotexportError(
                    "the session has gone on without this answer; ask for it again"
                )
            token = next(answer, None)
            if token is None:
                return
            said = replace(said, answer=said.answer + token.text, length=session.length)
            session.said = said
            yield token


def opening(text: Text, messages: Sequence[Plain], variables: Plain) -> tuple[Ids, int]:
    """(ids of a whole conversation up to where the answer begins, how many of them stand before the
    first message that is no system prompt; none if there is no such prompt)."""
    controls = text.controls
    mask = controls.mask()
    hidden, given = [_over(each, mask) for each in messages], mask.over(variables)
    rendered = text.chat(hidden, **given)
    mask.check(rendered)
    upto = 0
    after = next((n for n, each in enumerate(hidden) if each["role"] not in SYSTEM), 0)
    content = hidden[after].get("content", "")
    if after and content.strip():
        # Behind its outer blanks, which the template may strip.
        begin = len(content) - len(content.lstrip())
        mark = mask.hide("")
        hidden[after]["content"] = content[:begin] + mark + content[begin:]
        head, *tails = text.chat(hidden, **given).split(mark)
        if [head + tail for tail in tails] == [rendered]:
            upto = len(head)
    return controls.encode(rendered, mask, upto=upto)


def following(text: Text, messages: Sequence[Plain], count: int, variables: Plain) -> Ids | None:
    """Ids of what comes behind the answer to the first `count` messages, from its end on to where
    the next answer begins; None if the template does not show where that is.

    Of what was said before only marks are rendered, so that a long conversation costs little; some
    templates repeat the system prompt behind it.
    """
    controls = text.controls
    mask = controls.mask()
    answer = mask.hide("")
    made = [_short(each, mask) for each in messages[:count]]
    made.append({**mask.over(messages[count]), "content": answer})
    made += [_over(each, mask) for each in messages[count + 1 :]]
    parts = text.chat(made, **mask.over(variables)).split(answer)
    if len(parts) != 2:
        return None
    mask.check(parts[1])
    return controls.encode_rest(parts[1], mask)


def _over(message: Plain, mask: Mask) -> Plain:
    """With a mark for each control token's name; a book is one mark as a whole, for a template is
    not given more than it may make."""
    if len(message.get("content", "")) > LONG:
        return _short(message, mask)
    made: Plain = mask.over(message)
    return made


def _short(message: Plain, mask: Mask) -> Plain:
    """With a mark for its content, outer blanks aside, which a template may strip."""
    made, content = mask.over(message), message.get("content", "")
    inner = content.strip()
    if inner:
        made["content"] = content.replace(inner, mask.hide(inner), 1)
    return dict(made)
