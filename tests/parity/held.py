"""A bundle of a tiny model that holds several policies, beside the eager loop and the rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potexport import pipeline, statistics
from potexport.following import Oracle
from potexport.runtime.session import Session
from potexport.runtime.text import Text
from tests import tiny
from tests.parity.conftest import POT
from tests.parity.test_loop import CATALYST, Kept, load, reference, watch

# Windows that have fewer tokens than are read between two compressions; pools smaller than those
# of large pots. Without an entry a policy is built as it is.
SPECS = {
    "snapkv": "snapkv:window=5,pool=3",
    "vatp": "vatp:window=6",
    "keydiff": "keydiff:pool=3",
    "vnorm": "vnorm:pool=3",
    "infinipot": "infinipot:alpha=0.3,pool=3",
    "catalyst": "catalyst:pool=1",
    "expected-attention": "expected-attention:future=40",
    "random": "random:seed=7",
    "blend": "blend:keydiff(pool=3,rotated=false) + 2*catalyst(pool=3) + -0.5*sirllm",
}
WIDTH = 32  # of the catalyst: what a policy's default window may need
GEOMETRY = {**POT, "catalyst_width": WIDTH}


@dataclass(frozen=True)
class Held:
    """A bundle that holds several policies, opened with all of them, and its model."""

    folder: Path
    model: Path
    session: Session

    @classmethod
    def build(cls, folder: Path, specs: list[str], **options: Any) -> Held:
        tiny.save(folder / "model", num_hidden_layers=options.pop("layers", 2))
        (folder / "text.txt").write_text(tiny.TEXT * 8)
        asked = pipeline.Options(
            model=str(folder / "model"),
            policy=tuple(specs),
            calibration=folder / "text.txt",
            **{**GEOMETRY, **options},
        )
        labels = [each.label for each in pipeline.build(asked, folder / "bundle").policies]
        session = Session.open(folder / "bundle", threads=1, policy=labels)
        return cls(folder / "bundle", folder / "model", session)

    def oracle(self, **geometry: Any) -> Oracle:
        """The eager loop, with another geometry if asked for."""
        manifest = self.session.manifest
        manifest = replace(manifest, pot=replace(manifest.pot, **geometry))
        text = Text.open(str(self.folder))
        return Oracle.of(self.folder, manifest, load(self.model), text)

    def reference(self, name: str, **changes: Any) -> Any:
        """The independent loop, with the rule of a policy."""
        pot = self.session.manifest.pot
        known = statistics.read(self.folder) if name == "expected-attention" else None
        return reference(
            load(self.model),
            name,
            self.session.manifest.policy_of(name).settings,
            **{
                "widest": pot.widest,
                "positions": pot.positions,
                "statistics": known,
                **changes,
            },
        )


def begin(session: Session, policy: str) -> Kept:
    session.reset()
    session.set_catalyst(CATALYST)
    session.policy, session.keep = policy, session.manifest.pot.keep
    return watch(session)
