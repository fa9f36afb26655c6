"""A reference that follows another run's compressions.

Runs that round differently decide near ties differently, and from then on read different contexts:
logits could not be compared any more, nor could slots. So the reference, in fp32 PyTorch, says at
each compression what it would have kept, and goes on with what the other run kept.
"""

from __future__ import annotations

import numpy as np
import torch

from potexport.graphs.model import PotModel
from potexport.graphs.policies import Policy
from potexport.recording import Recording
from potexport.reference import TorchBackend
from potexport.runtime.backend import Array
from potexport.spec import Layout


class FollowingBackend(TorchBackend):
    """TorchBackend whose `compress` answers with its own choice, and keeps the leader's."""

    def __init__(self, core: PotModel, policy: Policy, layout: Layout, leader: Recording) -> None:
        super().__init__(core, policy, layout)
        self._led = iter(leader.kept)

    def observe(self, ids: Array) -> None:
        super().observe(ids)
        for array, mass in zip(self.pot.mass, self._mass, strict=True):
            array[:] = mass.numpy()  # for whoever watches; the choice is made from the tensors

    @torch.no_grad()
    def compress(self, keep: int) -> list[Array]:
        scores = [[torch.from_numpy(a) for a in each] for each in (self.pot.mass, self.pot.novelty)]
        mass, novelty = (each or None for each in scores)
        fill, count = (torch.tensor([n], dtype=torch.int32) for n in (self.pot.fill, keep))
        own = self.squeeze.choose(fill, count, self._keys, self._values, mass, novelty)
        wide = ((0, 0), (0, self.layout.pot.keep_max - keep))
        led = [torch.from_numpy(np.pad(kept, wide)) for kept in next(self._led)]
        out = self.squeeze.gather(led, self._keys, self._values, novelty)
        keys, values, carried = (
            [row.numpy() for row in rows] for rows in (out.keys, out.values, out.novelty)
        )
        self.pot.replace(keys, values, carried, keep)
        return [kept[:, :keep].numpy() for kept in own]
