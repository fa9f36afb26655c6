"""The compression graphs of a bundle as PyTorch modules, with the statistics that some need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport.plan import Plan

if TYPE_CHECKING:
    from potexport.graphs.compress import Compress
    from potexport.graphs.model import PotModel


def compressions(
    decided: Plan, core: PotModel, tokenizer: Any, folder: Path, stage: Callable[[str], None]
) -> dict[str, Compress]:
    """By graph. Where a policy wants statistics of queries, or a coded pot those of keys, they are
    measured and written into the bundle."""
    from potexport import calibrate, channels, statistics
    from potexport.graphs.compress import Compress

    if decided.layout.coding:
        channels.check(core, decided.layout)
        stage("channels")
        own = decided.options.calibration
        ids = channels.tokens(calibrate.read_text(own) if own else channels.TEXT, tokenizer)
        channels.write(folder, channels.measure(core, decided.layout, ids), core.turn)
    found = None
    if decided.statistics:
        stage("statistics")
        assert decided.options.calibration is not None  # `plan` saw to it
        text = calibrate.read_text(decided.options.calibration)
        found = statistics.measure(core, decided.traced, statistics.tokens(text, tokenizer))
        statistics.write(folder, found)
    return {
        facts.graph: Compress(
            policy,
            decided.layout.pot,
            core.turns,
            found if "queries" in facts.needs else None,
            in_place=decided.layout.in_place,
        )
        for facts, policy in decided.policies
    }
