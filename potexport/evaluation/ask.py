"""An answer under teacher forcing: one reading gives exact match, digits and nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potexport.evaluation.needles import Question
from potexport.runtime.backend import Array
from potexport.runtime.sampling import surprise
from potexport.runtime.session import Ids, Session


@dataclass(frozen=True)
class Answer:
    """right: (n,) bool, whether each wanted token was the likeliest; nats: (n,), its surprise."""

    right: Array
    nats: Array

    @classmethod
    def of(cls, logits: Array, wanted: Ids) -> Answer:
        """logits: (n, V) float32, each of the token that follows."""
        nats = [surprise(row, int(token)) for row, token in zip(logits, wanted, strict=True)]
        return cls(logits.argmax(-1) == wanted, np.array(nats))

    @property
    def exact(self) -> bool:
        """Whether a greedy answer would have been the number: while it is right, it sees what is
        given here."""
        return bool(self.right.all())


def ask(session: Session, question: Question) -> Answer:
    """Ask behind what the session has read; it goes on from there."""
    session.feed(question.given)
    rows = []
    for token in question.wanted:
        rows.append(session.logits().copy())
        session.accept(int(token))
    return Answer.of(np.stack(rows), question.wanted)
