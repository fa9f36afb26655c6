"""An answer, token by token: where it ends, and which of its text may be shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from potexport.errors import PotexportError
from potexport.runtime.records import Token
from potexport.runtime.sampling import Sampler
from potexport.runtime.text import StopStrings

if TYPE_CHECKING:
    from potexport.runtime.session import Session


def check_limit(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise PotexportError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


def generated(
    session: Session, limit: int, sampler: Sampler, stops: StopStrings, *, takes_end: bool = True
) -> Iterator[Token]:
    """takes_end: whether the end token becomes part of what was read; otherwise its logits wait for
    what is fed in its place."""
    stream = session.text.stream()
    for step in range(limit):
        token = sampler.pick(session.logits())
        over = token in session.manifest.eos_token_ids
        if takes_end or not over:
            session.accept(token)
        ends = over or step == limit - 1
        piece, stopped = stops.push(stream.push(token))
        if ends and not stopped:
            tail, stopped = stops.push(stream.flush())
            piece += tail if stopped else tail + stops.flush()
        yield Token(token, piece)
        if ends or stopped:
            return
