"""A reference that follows another run's compressions.

Runs that round differently decide near ties differently, and from then on read different contexts:
logits could not be compared any more, nor could slots. So the reference, in fp32 PyTorch, says at
each compression what it would have kept, and goes on with what the other run kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potexport.bundle import Manifest
from potexport.graphs.model import PotModel
from potexport.graphs.policies import Policy
from potexport.graphs.policies._find import make_policy
from potexport.recording import Recording
from potexport.reference import TorchBackend
from potexport.runtime.session import Session
from potexport.runtime.text import Text
from potexport.spec import Layout


class FollowingBackend(TorchBackend):
    """TorchBackend whose `compress` answers with its own choice, and keeps the leader's."""

    def __init__(self, core: PotModel, policy: Policy, layout: Layout, leader: Recording) -> None:
        super().__init__(core, policy, layout)
        self._led = iter(leader.kept)

    def decide(self, own: list[Tensor], keep: int) -> list[Tensor]:
        wide = ((0, 0), (0, self.layout.pot.keep_max - keep))
        return [torch.from_numpy(np.pad(kept, wide)) for kept in next(self._led)]


@dataclass(frozen=True)
class Oracle:
    """A bundle's loop in fp32 PyTorch."""

    manifest: Manifest
    core: PotModel
    policy: Policy
    text: Text

    @classmethod
    def of(cls, manifest: Manifest, model: PreTrainedModel, text: Text) -> Oracle:
        """Takes over `model`, in fp32."""
        policy = make_policy(manifest.policy.name, manifest.policy.settings)
        return cls(manifest, PotModel(model, manifest.pot), policy, text)

    def session(self, leader: Recording | None = None) -> Session:
        """One that compresses by its own choice, or that follows a leader."""
        facts, pot, needs = self.manifest.model, self.manifest.pot, self.manifest.layout.needs
        layout = Layout(facts, pot, needs)
        backend = TorchBackend(self.core, self.policy, layout)
        if leader is not None:
            backend = FollowingBackend(self.core, self.policy, layout, leader)
        return Session(self.manifest, backend, self.text)
