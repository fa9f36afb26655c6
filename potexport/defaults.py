"""What is best by measurement, for a model of what size; docs/quality.md has the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Default:
    """up_to: parameters. policy: as `--policy` takes it. evidence: what it rests on."""

    up_to: float
    policy: str
    evidence: str


TABLE = (
    Default(
        1e9,
        "blend:keydiff + 0.5*vnorm + 2*catalyst",
        "measured here on SmolLM2-135M (docs/quality.md)",
    ),
    Default(
        float("inf"),
        "infinipot",
        "arXiv 2410.01518, tables 1 and 2, on models of 7 and 8 billion; not measured here",
    ),
)

# Where an NPU's compiler makes the graphs: what all thirty layers were proven with on its emulator.
COMPILED = "infinipot"


def policy(model: PreTrainedModel) -> str:
    """For a model, without storage or with, that was not said what to keep."""
    from potexport.facts import parameters

    count = parameters(model)
    return next(each.policy for each in TABLE if count <= each.up_to)
