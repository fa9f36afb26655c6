"""Builds of the tiniest model in this process, for `kills`: torch is imported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from potexport import pipeline
from tests import tiny


def builder(model: Path, output: Path) -> Callable[[str], object]:
    """What builds a bundle there, in place of an older one, with a catalyst that tells it apart."""
    tiny.save(model, "llama-tied", num_hidden_layers=1)

    def build(catalyst: str) -> object:
        options = pipeline.Options(
            model=str(model), pot=48, chunk=8, keep=24, catalyst_width=8, sink=2, recent=4,
            policy="streaming", catalyst=catalyst,
        )  # fmt: skip
        return pipeline.build(options, output, force=True)

    return build
