"""What one run of the loop did, to hold it against another run over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potexport.errors import PotexportError
from potexport.runtime.backend import Array, Backend
from potexport.runtime.session import Session
from potexport.spec import SCORES

TINY = 1e-30  # in place of a largest of 0: scores of a policy that was asked nothing


@dataclass
class Recording:
    """One run. Compressions are in order.

    logits: (S, V) float32. tokens: (S,) int32, what followed each: the likeliest, or a forced one.
    fill, keep: of each compression, how many slots were occupied before and after.
    kept: C x (L, Hkv, keep) int32, slots. scores: name -> C x (L, Hkv, fill) float32, of the slots
        before each compression: "mass" and "novelty" where the policy has them.
    """

    logits: Array
    tokens: Array
    fill: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)
    kept: list[Array] = field(default_factory=list)
    scores: dict[str, list[Array]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"logits": self.logits, "tokens": self.tokens}
        arrays["fill"] = np.array(self.fill, np.int32)
        arrays |= {f"kept/{c}": array for c, array in enumerate(self.kept)}
        for name, each in self.scores.items():
            arrays |= {f"{name}/{c}": array for c, array in enumerate(each)}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Recording:
        with np.load(path) as file:
            made = cls(file["logits"], file["tokens"], [int(n) for n in file["fill"]])
            made.kept = [file[f"kept/{c}"] for c in range(len(made.fill))]
            made.keep = [kept.shape[-1] for kept in made.kept]
            for name in sorted({key.split("/")[0] for key in file.files if "/" in key} - {"kept"}):
                made.scores[name] = [file[f"{name}/{c}"] for c in range(len(made.fill))]
        return made


def enough_tokens(session: Session, text: str | None, count: int, short: str) -> Array:
    """The first (count,) tokens of a text; seeded random ones if there is none.

    short: what the PotexportError says of a text that has fewer.
    """
    if text is None:
        return np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, count)
    ids = session.text.encode(text[: count * 20])
    if ids.size < count:
        raise PotexportError(f"the text has {ids.size} tokens; {short}")
    return ids[:count]


class _Watched:
    """A backend that writes down each compression."""

    def __init__(self, inner: Backend, into: Recording, needs: frozenset[str]) -> None:
        self._inner, self._into, self.pot = inner, into, inner.pot
        self._names = [name for name in SCORES if name in needs]
        self.prefill, self.decode, self.observe = inner.prefill, inner.decode, inner.observe
        self.policy, self.fork = inner.policy, inner.fork

    def compress(self, keep: int, *, reset: bool = True) -> list[Array]:
        into, pot = self._into, self.pot
        into.fill.append(pot.fill)
        for name in self._names:
            scores = np.stack(pot.scores[name])[..., : pot.fill]
            into.scores.setdefault(name, []).append(scores.astype(np.float32))
        kept = self._inner.compress(keep, reset=reset)
        into.keep.append(keep)
        into.kept.append(np.stack(kept).copy())
        return kept


def record(
    session: Session,
    ids: Array,
    *,
    forced: Array | None = None,
    steps: int = 0,
    catalyst: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Feed `ids`, then take tokens one by one: those of `forced`, whatever the logits say; or else
    the likeliest, until an end token or `steps` of them."""
    count = steps if forced is None else forced.size
    logits = np.zeros((count, session.manifest.model.vocab_size), np.float32)
    made = Recording(logits, np.zeros(count, np.int32))
    inner = session.backend
    session.reset()
    if catalyst is not None:
        session.set_catalyst(catalyst)
    session.backend = _Watched(inner, made, frozenset(session.backend.policy.needs))
    try:
        session.feed(ids, on_progress=on_progress)
        for step in range(count):
            made.logits[step] = session.logits()
            token = int(made.logits[step].argmax() if forced is None else forced[step])
            made.tokens[step] = token
            session.accept(token)
            if on_progress:
                on_progress(ids.size + step + 1, ids.size + count)
            if forced is None and token in session.manifest.eos_token_ids:
                made.logits, made.tokens = made.logits[: step + 1], made.tokens[: step + 1]
                break
    finally:
        session.backend = inner
    return made


def origins(made: Recording) -> list[Array]:
    """Which tokens were kept: C x (L, Hkv, keep) int32, numbered from 0 as they were read.

    Slots say it only until the first compression moves them.
    """
    found: list[Array] = []
    read = 0
    for fill, kept in zip(made.fill, made.kept, strict=True):
        before = found[-1] if found else np.empty((*kept.shape[:2], 0), np.int32)
        fresh = np.arange(read, read + fill - before.shape[-1], dtype=np.int32)
        read += fresh.size
        held = np.concatenate([before, np.broadcast_to(fresh, (*kept.shape[:2], fresh.size))], -1)
        found.append(np.take_along_axis(held, kept, axis=-1))
    return found


@dataclass(frozen=True)
class Comparison:
    """One run against a reference run that followed it (`potexport.following`).

    cosine: smallest of any position's logits. top1: share of positions with the same best token;
    gap: how far below the reference's best token another one lay at most, as a share of the
        position's largest logit.
    overlap: smallest share, of any head over all compressions, of kept slots that both chose.
    disagreements: how many of all `kept` slots the reference chose and the other run did not.
    noise: name of a score -> the largest difference in any slot, as a share of the largest score of
        its head. What decides on scores alone can only disagree about slots whose scores lie this
        close, twice, to the edge between kept and dropped.
    """

    cosine: float
    top1: float
    gap: float
    compressions: int
    overlap: float
    kept: int
    disagreements: int
    noise: dict[str, float]


def compare(mine: Recording, reference: Recording) -> Comparison:
    """Hold a run against its reference."""
    if mine.fill != reference.fill or mine.keep != reference.keep:
        raise ValueError("the two runs did not compress at the same tokens")
    a, b = mine.logits.astype(np.float64), reference.logits.astype(np.float64)
    cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    rows, top = np.arange(len(b)), np.abs(b).max(-1, initial=0.0)
    gaps = (b.max(-1, initial=-np.inf) - b[rows, a.argmax(-1)]) / top
    lost = np.zeros(mine.kept[0].shape[:2] if mine.kept else (1, 1), int)  # of each head
    for kept, wanted in zip(mine.kept, reference.kept, strict=True):
        for head in np.ndindex(*wanted.shape[:2]):
            lost[head] += np.setdiff1d(wanted[head], kept[head]).size
    of_each = sum(kept.shape[-1] for kept in mine.kept)
    return Comparison(
        cosine=float(cosines.min()) if cosines.size else 1.0,
        top1=float((a.argmax(-1) == b.argmax(-1)).mean()) if len(a) else 1.0,
        gap=float(gaps.max()) if gaps.size else 0.0,
        compressions=len(reference.fill),
        overlap=1 - float(lost.max()) / max(of_each, 1),
        kept=sum(each.size for each in reference.kept),
        disagreements=int(lost.sum()),
        noise={
            name: max(
                float((np.abs(one - other).max(-1) / np.abs(other).max(-1).clip(TINY)).max())
                for one, other in zip(mine.scores[name], scores, strict=True)
            )
            for name, scores in reference.scores.items()
        },
    )
