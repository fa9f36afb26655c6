"""The tasks `qa` and `summary`: records are read, answered greedily, and scored.

Decides who answers, and what is cut off a context that is longer than the untouched model was
trained on. Records are `longbench`'s, the measures `scores`'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from potexport.evaluation import tables
from potexport.evaluation.longbench import Record
from potexport.evaluation.loop import latest
from potexport.evaluation.retrieval import Readers
from potexport.evaluation.scores import estimate, f1, rouge_l
from potexport.evaluation.settings import Mode, Tell
from potexport.runtime import reading
from potexport.runtime.session import Ids

if TYPE_CHECKING:
    from potexport.evaluation.untouched import Untouched

METRICS = {"qa": ("f1", f1), "summary": ("rouge-l", rouge_l)}


@dataclass
class Scored:
    """The scores of one reader on one dataset, in the order of records; context: which document a
    record is about."""

    scores: list[float] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """head, context and tail are what is read; the question is in the tail."""

    head: Ids
    context: Ids
    tail: Ids


@dataclass
class Texts:
    """Answers records. cut: of how many contexts the untouched model got the ends alone."""

    readers: Readers
    tell: Tell
    table: dict[tuple[str, str, str, Mode], Scored] = field(
        default_factory=lambda: defaultdict(Scored)
    )  # by task, dataset, reader, mode
    cut: int = 0
    untruncated: int = 0  # records whose question alone fills the pot

    def read(self, record: Record, name: str) -> None:
        """One record, by all readers."""
        text = self.readers.loop.session.text
        around = reading.frame(text, question=record.question, system=None, raw=False)
        pieces = reading.pieces(text, [record.context], trusted=around.trusted)
        prompt = Prompt(around.head, np.concatenate(list(pieces)), around.tail)
        if self.readers.untouched is not None:
            self.tell(f"{name}: full")
            answer = self._full(self.readers.untouched, record, prompt)
            self._add("full", self.readers.modes, record, prompt, answer)
        ids = np.concatenate([prompt.head, prompt.context])
        beginning = self.readers.loop.begin(ids)
        for policy in self.readers.policies:
            for mode, modes in self.readers.readings(policy):
                self.tell(f"{name}: {policy}, question {mode}")
                known = record.known if mode == "known" else None
                self.readers.loop.read(beginning, ids, policy, known)
                self._add(policy, modes, record, prompt, self._answer(prompt, record.most))
        self.tell(f"{name}: truncation")
        self._truncation(record, prompt)

    def _truncation(self, record: Record, prompt: Prompt) -> None:
        """As many of the last tokens as the whole pot holds beside a question and its answer, which
        ends where the pot does."""
        pot = self.readers.loop.session.manifest.pot
        slots = pot.slots + pot.smallest
        most = min(record.most, slots // 2)
        room = slots - prompt.tail.size - most
        if room <= prompt.head.size:
            self.untruncated += 1
            return
        self.readers.loop.read_whole(latest(prompt.head, prompt.context, room))
        self._add("truncation", self.readers.modes, record, prompt, self._answer(prompt, most))

    def _add(
        self, reader: str, modes: Sequence[Mode], record: Record, prompt: Prompt, answer: str
    ) -> None:
        score = METRICS[record.task][1](record.taken(answer), record.answers)
        context = sha256(record.context.encode("utf-8", "surrogatepass")).hexdigest()
        for mode in modes:
            scored = self.table[record.task, record.dataset, reader, mode]
            scored.scores.append(score)
            scored.contexts.append(context)
            scored.tokens.append(prompt.context.size)

    def _answer(self, prompt: Prompt, most: int) -> str:
        session = self.readers.loop.session
        session.feed(prompt.tail)
        return "".join(token.text for token in session.generate(max_new_tokens=most))

    def _full(self, untouched: Untouched, record: Record, prompt: Prompt) -> str:
        """Cut in the middle where the model was not trained on so many tokens.

        Source: arXiv 2308.14508 (LongBench), section 4.1. Differs: nothing.
        """
        session = self.readers.loop.session
        most = session.manifest.model.max_positions - record.most
        room = max(2, most - prompt.head.size - prompt.tail.size)
        context = prompt.context
        if context.size > room:
            half = room // 2
            context = np.concatenate([context[:half], context[context.size - half :]])
            self.cut += 1
        untouched.read(np.concatenate([prompt.head, context]))
        made = untouched.generate(
            prompt.tail, most=record.most, ends=session.manifest.eos_token_ids
        )
        return session.text.decode(made)

    def rows(self, task: str, *, depending: frozenset[str], seed: int) -> list[tables.Row]:
        rows = []
        for (of, dataset, reader, mode), scored in self.table.items():
            if of != task:
                continue
            sums, counts = _by_context(scored)
            row = tables.head(reader, mode, depending, dataset=dataset, metric=METRICS[task][0])
            row |= {"documents": len(sums), "records": len(scored.scores)}
            row["tokens"] = float(np.mean(scored.tokens))
            row["score"] = estimate(sums, counts, seed=seed).to_json()
            row["per_record"] = scored.scores
            rows.append(row)
        return rows


def _by_context(scored: Scored) -> tuple[list[float], list[int]]:
    """Scores summed over the records of a document, and how many they are."""
    sums: dict[str, list[float]] = defaultdict(list)
    for context, score in zip(scored.contexts, scored.scores, strict=True):
        sums[context].append(score)
    return [sum(each) for each in sums.values()], [len(each) for each in sums.values()]
