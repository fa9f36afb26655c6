"""Rows of the result, from what the readers made of each document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from potexport.evaluation.ask import Answer
from potexport.evaluation.needles import BINS, Question
from potexport.evaluation.retrieval import Seen, Table
from potexport.evaluation.scores import estimate
from potexport.evaluation.settings import BASELINES, MODES, Mode
from potexport.runtime.backend import Array

Row = dict[str, Any]
Pair = tuple[Question, Answer]
# What an answer is worth: (a sum, over so many).
MEASURES: Mapping[str, Callable[[Answer], tuple[float, int]]] = {
    "exact": lambda answer: (float(answer.exact), 1),
    "digit": lambda answer: (float(answer.right.sum()), answer.right.size),
    "nats": lambda answer: (float(answer.nats.sum()), answer.nats.size),
}


def head(policy: str, mode: Mode, depending: frozenset[str], **more: Any) -> Row:
    """What every row begins with."""
    return {
        "policy": policy,
        "question": mode,
        "same_either_way": policy not in depending,
        **more,
    }


def needle(table: Table, *, length: int, depending: frozenset[str], seed: int) -> list[Row]:
    rows = []
    for (policy, mode), seen in table.items():
        if not any(each.answers for each in seen):
            continue
        pairs = [pair for each in seen for pair in each.answers]
        row = head(policy, mode, depending, length=length, documents=len(seen))
        row |= {"questions": len(pairs), **_memory(seen)}
        of_documents = {
            name: [_sums(each.answers, measure) for each in seen]
            for name, measure in MEASURES.items()
        }
        for name, sums in of_documents.items():
            row[name] = estimate(*zip(*sums, strict=True), seed=seed).to_json()
        row["per_document"] = {
            name: [total / count for total, count in sums] for name, sums in of_documents.items()
        }
        row["by_kind"] = _by_kind(pairs)
        row["cells"] = _cells(pairs)
        rows.append(row)
    return rows


def _memory(seen: Sequence[Seen]) -> Row:
    return {
        "compressions": float(np.mean([each.compressions for each in seen])),
        "held": float(np.mean([each.held for each in seen])),
    }


def _sums(
    pairs: Iterable[Pair], measure: Callable[[Answer], tuple[float, int]]
) -> tuple[float, float]:
    total, count = np.sum([measure(answer) for _, answer in pairs], axis=0)
    return float(total), float(count)


def _means(pairs: Sequence[Pair]) -> Row:
    sums = {name: _sums(pairs, measure) for name, measure in MEASURES.items()}
    return {name: total / count for name, (total, count) in sums.items()}


def _by_kind(pairs: Iterable[Pair]) -> Row:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for question, answer in pairs:
        kinds[question.kind].append(answer.exact)
    return {kind: float(np.mean(exact)) for kind, exact in kinds.items()}


def _cells(pairs: Iterable[Pair]) -> list[Row]:
    """Means of each bin of depth that has a needle."""
    bins: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        bins[min(int(pair[0].depth * BINS), BINS - 1)].append(pair)
    return [
        {"depth": (i + 0.5) / BINS, "width": 1 / BINS, "count": len(bins[i]), **_means(bins[i])}
        for i in sorted(bins)
    ]


def hit_rate(
    table: Table, *, length: int, keep: int, depending: frozenset[str], seed: int
) -> list[Row]:
    rows = []
    for (policy, mode), seen in table.items():
        if not any(each.rates for each in seen):
            continue
        layers = np.stack([np.mean(each.rates, axis=0) for each in seen])  # (documents, L)
        row = head(policy, mode, depending, length=length, documents=len(seen))
        held = _memory(seen)["held"]
        row |= {"held": held, "tops": min(keep, length), "chance": min(1.0, held / length)}
        rates = layers.mean(-1).tolist()
        row["rate"] = estimate(rates, seed=seed).to_json()
        row["per_document"] = {"rate": rates}
        row["layers"] = layers.mean(0).tolist()
        rows.append(row)
    return rows


def perplexity(nats: Mapping[str, Sequence[Array]], *, length: int, seed: int) -> list[Row]:
    rows = []
    for policy, found in nats.items():
        row = head(policy, "unknown", frozenset(), length=length, documents=len(found))
        row["tokens"] = sum(each.size for each in found)
        mean = estimate(
            [float(each.sum()) for each in found], [each.size for each in found], seed=seed
        )
        row["perplexity"] = mean.map(np.exp).to_json()
        row["nats"] = mean.to_json()
        if "full" in nats:  # the same tokens: documents differ far more than readers do
            row["above_full"] = estimate(
                [float((a - b).sum()) for a, b in zip(found, nats["full"], strict=True)],
                [each.size for each in found],
                seed=seed,
            ).to_json()
        row["per_document"] = {"nats": [float(each.mean()) for each in found]}
        rows.append(row)
    return rows


def in_order(rows: Iterable[Row], policies: Sequence[str]) -> list[Row]:
    """`full`, `oracle`, the policies as the bundle has them, `truncation`."""
    order = {name: i for i, name in enumerate((*BASELINES[:2], *policies, *BASELINES[2:]))}
    return sorted(
        rows,
        key=lambda row: (
            row.get("dataset", ""),
            order[row["policy"]],
            row.get("length", 0),
            MODES.index(row["question"]),
        ),
    )
