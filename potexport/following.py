"""A reference that follows another run's compressions.

Runs that round differently decide near ties differently, and from then on read different contexts:
logits could not be compared any more, nor could slots. So the reference, in fp32 PyTorch, says at
each compression what it would have kept, and goes on with what the other run kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potexport import statistics
from potexport.bundle import Manifest, PolicyFacts
from potexport.graphs.model import PotModel
from potexport.graphs.policies import Policy
from potexport.graphs.policies._find import make_policy
from potexport.recording import Recording
from potexport.reference import TorchBackend
from potexport.runtime.backend import Array
from potexport.runtime.coded_pot import KeyFacts, read_key_facts
from potexport.runtime.session import Session
from potexport.runtime.text import Text


class FollowingBackend(TorchBackend):
    """TorchBackend whose `compress` answers with its own choice, and keeps the leader's."""

    def follow(self, leader: Recording) -> FollowingBackend:
        self._led = iter(leader.kept)
        return self

    def decide(self, own: list[Tensor], counts: Array) -> list[Tensor]:
        most = [slots.shape[1] for slots in own]
        return [
            torch.from_numpy(np.pad(kept, ((0, 0), (0, width - kept.shape[1]))))
            for kept, width in zip(next(self._led), most, strict=True)
        ]


@dataclass(frozen=True)
class Oracle:
    """A bundle's loop in fp32 PyTorch. statistics: of queries, where a policy needs
    them. key_facts: where the pot is coded."""

    manifest: Manifest
    core: PotModel
    policies: tuple[tuple[PolicyFacts, Policy], ...]
    text: Text
    statistics: tuple[Tensor, Tensor] | None = None
    key_facts: KeyFacts | None = None

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, model: PreTrainedModel, text: Text) -> Oracle:
        """Takes over `model`, in fp32."""
        policies = tuple((facts, _policy(facts)) for facts in manifest.policies)
        known = statistics.read(folder) if "queries" in manifest.layout.gathered else None
        key_facts = read_key_facts(folder, manifest.layout)
        core = PotModel(model, manifest.model, manifest.pot)
        return cls(manifest, core, policies, text, known, key_facts)

    @property
    def policy(self) -> Policy:
        """The bundle's default."""
        return self.policies[0][1]

    def session(self, leader: Recording | None = None, *, policy: str | None = None) -> Session:
        """One that compresses by its own choice, or that follows a leader."""
        layout = replace(self.manifest.layout, dtype="float32")
        kind = TorchBackend if leader is None else FollowingBackend
        backend = kind(self.core, self.policies, layout, self.statistics, self.key_facts)
        if isinstance(backend, FollowingBackend) and leader is not None:
            backend.follow(leader)
        session = Session(self.manifest, backend, self.text, self.manifest.policies)
        session.policy = policy or self.manifest.policy.label
        return session


def _policy(facts: PolicyFacts) -> Policy:
    return make_policy(facts.name, facts.settings)
