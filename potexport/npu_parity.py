"""`verify` for an NPU: a bundle's graphs, compiled anew, on the emulator against fp32 PyTorch.

First each graph by itself, over one pot that the reference filled; then the whole loop, which reads
past its compressions and answers. The contexts of a bundle share their weights, which the emulator
cannot load, so the same graphs are compiled apart here.

The loop's oracle follows the emulator's compressions and says at each what it would have kept: one
near tie decided otherwise, and two runs would read different contexts from then on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potexport import htp, npu_graphs
from potexport.bundle import Manifest, Npu
from potexport.recording import Recording, compare, origins, record
from potexport.runtime.session import Session
from potexport.spec import SCORES
from potexport.targets import Soc

if TYPE_CHECKING:
    from potexport.following import Oracle
    from potexport.graphs.policies import Policy
    from potexport.parity import Report
    from potexport.runtime.backend import Array


@dataclass(frozen=True)
class Limits:
    """What the emulated loop may differ by from PyTorch in fp32.

    cosine: 1 - that of any position's logits. kept, head: share of kept slots, of all and of the
    worst head, where pooling makes one near tie a window of slots. scores: of a head's largest.
    tie: how far a chosen token may lie below the best, of the largest logit.
    """

    cosine: float
    kept: float
    head: float
    scores: float
    tie: float


# Measured with SmolLM2-135M: fp16, 30 layers: 2e-3, 0.2%, 1.5%, 0.8%, 0; two layers: a16w8 7e-5,
# 0.7%, 2.5%, 1.3%, 0; w4 3e-3, 3%, 6%, 14%, 1.1%.
LIMITS = {
    "fp16": Limits(0.005, 0.01, 0.025, 0.02, 0.01),
    "a16w8": Limits(0.01, 0.04, 0.1, 0.06, 0.03),
    "w4": Limits(0.1, 0.2, 0.4, 0.5, 0.1),
}


@dataclass(frozen=True)
class Reading:
    """What the emulator is compared over: the tokens to read, what scores the pot, and how many
    tokens to answer."""

    ids: Array
    catalyst: Array
    steps: int
    question: str | None = None


def verify(
    report: Report,
    folder: Path,
    npu: Npu,
    oracle: Oracle,
    over: Reading,
    on_stage: Callable[[str], None],
) -> None:
    """Add the emulator's checks to a report.

    Raises PotexportError if the compiler or the emulator crashes or takes too long.
    """
    soc = Soc(npu.soc, npu.chip, npu.htp_arch, npu.soc_model)
    catalyst = over.catalyst.tolist()
    with tempfile.TemporaryDirectory(prefix="potexport-verify-") as place:
        on_stage(f"compile for {soc.name}, unshared")
        htp.compile_graphs(folder, list(npu.contexts), soc, Path(place), shared=False)
        files = htp.contexts(Path(place), list(npu.contexts), soc)
        on_stage("each graph on the emulator")
        npu_graphs.check(report, folder, npu, files, oracle.session(), over.ids, over.catalyst)
        on_stage(f"the loop on the emulator, {over.ids.size} tokens")
        mine = htp.read(
            folder,
            files,
            over.ids,
            embedding=npu.embedding,
            steps=over.steps,
            catalyst=catalyst,
        )
    on_stage("the same in PyTorch, and on the CPU alone")
    following = record(oracle.session(mine), over.ids, forced=mine.tokens, catalyst=catalyst)
    _loop(report, mine, following, oracle.manifest, oracle.policy)
    cpu = Session.open(folder, backend="cpu", check=False)
    alone = record(cpu, over.ids, steps=over.steps, catalyst=catalyst)
    _answer(report, mine, following, alone, oracle.text.decode(mine.tokens), over)


def _loop(
    report: Report, mine: Recording, reference: Recording, manifest: Manifest, policy: Policy
) -> None:
    seen, limits = compare(mine, reference), LIMITS[report.precision]
    where = f"{seen.compressions} compressions, against PyTorch in fp32 that follows them"
    report.add(
        "npu loop: logits, 1 - cosine", 1 - seen.cosine, limits.cosine, f"worst position, {where}"
    )
    report.add(
        "npu loop: kept slots that differ",
        seen.disagreements / max(seen.kept, 1),
        limits.kept,
        where,
    )
    report.add(
        "npu loop: kept slots that differ in the worst head", 1 - seen.overlap, limits.head, where
    )
    for name, noise in seen.noise.items():
        report.add(f"npu loop: {name}", noise, limits.scores, f"of a head's largest, {where}")
    unexplained = selected_otherwise(mine, manifest, policy)
    if unexplained is not None:
        report.add(
            "npu loop: kept slots that its own scores do not explain",
            unexplained,
            0,
            "so that every difference above is a near tie of scores",
        )


def selected_otherwise(mine: Recording, manifest: Manifest, policy: Policy) -> int | None:
    """How many slots the emulator kept that PyTorch would not keep by the emulator's own scores.

    None for a policy whose scores the recording does not hold, for it reads keys or values.
    """
    import torch

    from potexport.graphs.select import Candidates, masks, select

    pot = manifest.pot
    if not policy.needs or not policy.needs <= set(SCORES):
        return None
    wrong = 0
    none = torch.zeros(1, dtype=torch.int32)  # nobody pins as a recording is made
    for number, (fill, keep) in enumerate(zip(mine.fill, mine.keep, strict=True)):
        count, kept = (torch.tensor([n], dtype=torch.int32) for n in (fill, keep))
        slot, forced, free_to_go = masks(pot.slots, count, none, sink=pot.sink, recent=pot.recent)
        for layer, chosen in enumerate(mine.kept[number]):
            wide = ((0, 0), (0, pot.slots - fill))
            # As the HTP has them: it computes in fp16.
            scores: dict[str, Any] = {
                name: torch.from_numpy(np.pad(each[number][layer], wide)).half().float()
                for name, each in mine.scores.items()
            }
            heads = manifest.model.kv_heads
            candidates = Candidates(
                slot, count, kept, pot.keep_max, forced, free_to_go, heads, **scores
            )
            wanted = select(policy.score(candidates), candidates)[:, :keep].numpy()
            wrong += sum(np.setdiff1d(a, b).size for a, b in zip(chosen, wanted, strict=True))
    return wrong


def _answer(
    report: Report,
    mine: Recording,
    reference: Recording,
    alone: Recording,
    answer: str,
    over: Reading,
) -> None:
    """What was generated, against the reference's and against a CPU that compresses by itself."""
    differing = int((reference.logits.argmax(-1) != mine.tokens).sum())
    shown = f"{answer!r}" + (f" to {over.question!r}" if over.question else "")
    report.add(
        "npu answer: tokens below the reference's best",
        compare(mine, reference).gap,
        LIMITS[report.precision].tie,
        f"of the largest logit; {differing} of {mine.tokens.size} greedy tokens differ: {shown}",
    )
    kept = [
        np.intersect1d(a, b).size / a.size
        for one, other in zip(origins(mine)[-1:], origins(alone)[-1:], strict=True)
        for layer, his in zip(one, other, strict=True)
        for a, b in zip(layer, his, strict=True)
    ]
    same = "the same" if np.array_equal(alone.tokens, mine.tokens) else "another"
    report.notes.append(
        f"The bundle on the CPU, by its own compressions: {same} answer; after the last of "
        f"{len(mine.keep)} compressions {float(np.mean(kept)) if kept else 1.0:.1%} of the tokens "
        "in the pot are the same. Near ties part the two, and each further."
    )
