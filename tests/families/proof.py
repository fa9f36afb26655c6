"""A family's tiny model, its bundle, and what is claimed of it, for each test to ask once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potexport import pipeline
from potexport.facts import model_facts
from potexport.graphs import adapters
from potexport.graphs.model import PotModel
from potexport.runtime.session import Session
from tests import tiny
from tests.parity.conftest import POT
from tests.parity.test_loop import CATALYST, INFINIPOT, difference, load, tokens, watch
from tests.reference_families import FamilyReference

SHORT, TOKENS = 30, 400
ASKED: dict[str, Any] = {"policy": "infinipot", "settings": INFINIPOT, **POT}


@dataclass(frozen=True)
class Proof:
    """A bundle and the model that it was made from."""

    family: str
    model: Path
    bundle: Path

    @classmethod
    def build(
        cls,
        family: str,
        folder: Path,
        *,
        layers: int = 3,
        sizes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Proof:
        """sizes: changes to the family's configuration."""
        model = tiny.save(folder / "model", family, num_hidden_layers=layers, **(sizes or {}))
        pipeline.build(pipeline.Options(model=str(model), **{**ASKED, **options}), folder / "it")
        return cls(family, model, folder / "it")

    def fits(self) -> float:
        """While the context fits: the largest difference of any logit from transformers' own, as a
        share of the largest. The text is longer than any window."""
        ids = tokens(SHORT)
        with torch.no_grad():
            wanted = load(self.model)(torch.from_numpy(ids[None].astype(np.int64))).logits[0]
        session = Session.open(self.bundle, threads=1)
        session.feed(ids[: SHORT // 2])
        worst = 0.0
        for step in range(SHORT // 2, SHORT):
            worst = max(worst, difference(session.logits(), wanted[step - 1]))
            session.accept(int(ids[step]))
        return worst

    def past(self, *, pinned: int = 0, **changes: Any) -> tuple[float, int]:
        """Past the pot: kept slots as the oracle's, or an AssertionError; then the largest
        difference of logits, keys or values, and the number of compressions. pinned: so many of the
        first tokens, which are sinks to the oracle; changes: to the oracle."""
        session = Session.open(self.bundle, threads=1)
        session.set_catalyst(CATALYST)
        kept = watch(session)
        session.feed(tokens(TOKENS)[:pinned])
        session.pin()
        session.feed(tokens(TOKENS)[pinned:])
        oracle = self.oracle(sink=max(POT["sink"], pinned), **changes)
        wanted = oracle.read(tokens(TOKENS).tolist())
        worst = difference(session.logits(), wanted)
        assert len(kept) == len(oracle.kept)
        for number, (mine, theirs) in enumerate(zip(kept, oracle.kept, strict=True)):
            for layer, pair in enumerate(zip(mine, theirs, strict=True)):
                assert np.array_equal(*pair), f"compression {number}, chosen layer {layer}"
        assert set(oracle.resets) == {True, False}
        pot = session.backend.pot
        assert pot.position == oracle.position
        for layer in range(session.manifest.model.layers):
            count = pot.filled(layer)
            keys, values = oracle.tail(layer, count)
            assert keys.shape[1] == count
            rows = pot.keys[layer][0, :, :, :count].transpose(0, 2, 1)
            worst = max(worst, difference(rows, keys))
            worst = max(worst, difference(pot.values[layer][0, :, :count], values))
        return worst, len(kept)

    def oracle(self, **changes: Any) -> Any:
        names = ("chunk", "keep", "keep_max", "sink", "recent", "positions")
        own: dict[str, Any] = {
            "slots": POT["pot"],
            "policy": "infinipot",
            "settings": INFINIPOT,
            "catalyst": CATALYST,
            "widest": max(POT["chunk"], POT["catalyst_width"]),
            **{name: POT[name] for name in names},
        }
        return FamilyReference(load(self.model), **{**own, **changes})

    def traits(self) -> dict[str, Any]:
        """What sets the family apart, measured on its model."""
        model = load(self.model)
        manifest = Session.open(self.bundle, threads=1).manifest
        core = PotModel(model, model_facts(model.config), manifest.pot)
        size = manifest.model.head_size
        turned = [
            0 if (table := core.turns.of(layer)) is None else _turned(table)
            for layer in range(manifest.model.layers)
        ]
        return {
            "type": model.config.model_type,
            "windows": sum(map(bool, manifest.pot.windows)),
            "still": turned.count(0),
            "turned": max(turned) / size,
            "neighbours": any(
                part.step == 2 for turn in core.turns.layers for part in turn.order if part.step
            ),
            "tables": core.turns.count,
            "experts": any(name.endswith("experts") for name, _ in model.named_modules()),
            "softcap": getattr(model.config, "attn_logit_softcapping", None) is not None,
            "sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
            "adapter": model.config.model_type in adapters.names(),
            "heads": "own"
            if manifest.model.kv_heads == manifest.model.query_heads
            else "one"
            if manifest.model.kv_heads == 1
            else "groups",
        }


def _turned(table: torch.Tensor) -> int:
    """Elements of a head that turn at all."""
    half = table.shape[1] // 2
    return 2 * int((table[:, half:] != 0).any(dim=0).sum())
