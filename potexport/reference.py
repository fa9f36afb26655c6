"""The loop in PyTorch, eagerly: the same modules that are exported, behind the runtime's interface.

It shares the session and the pot with the runtime, and nothing with ONNX. What it proves is that
export and graph runtime change nothing; that the modules themselves are right is shown by the
tests' own reference, which shares nothing with either.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from potexport.graphs.compress import Compress
from potexport.graphs.model import PotModel
from potexport.graphs.policies import Policy
from potexport.runtime.backend import Array, padded
from potexport.runtime.pot import Pot
from potexport.spec import Layout


class TorchBackend:
    """Runs a wrapped transformers model; see `runtime.backend.Backend` for each method."""

    def __init__(self, core: PotModel, policy: Policy, layout: Layout) -> None:
        self.core, self.layout = core, layout
        self.squeeze = Compress(policy, layout.pot, core.turn)
        self.pot = Pot(layout)
        # Tensors over the pot's own arrays: what the pot appends, the model sees.
        self._keys = [torch.from_numpy(array) for array in self.pot.keys]
        self._values = [torch.from_numpy(array) for array in self.pot.values]

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        width = self.layout.pot.chunk
        keys, values, logits, _ = self.run_pass(ids, width)
        novelty = np.zeros(ids.size + 1, np.float32)
        if "novelty" in self.layout.needs:
            wanted = np.zeros((1, width), np.int32)
            padded(wanted, next_ids)
            novelty[0] = first_novelty
            novelty[1:] = self.core.novelty(logits, torch.from_numpy(wanted))[0, : ids.size].numpy()
        self.pot.append(keys, values, novelty[:-1], ids.size)
        return float(novelty[-1])

    def decode(self, token: int, novelty: float) -> Array:
        keys, values, logits, _ = self.run_pass(np.array([token], np.int32), 1)
        self.pot.append(keys, values, novelty, 1)
        row: Array = logits[0, 0].numpy()
        return row

    def observe(self, ids: Array) -> None:
        mass = self.run_pass(ids, self.layout.pot.catalyst_width, observe=True)[3]
        for array, tensor in zip(self.pot.mass, mass, strict=True):
            array[...] = tensor.numpy()

    @torch.no_grad()
    def compress(self, keep: int) -> list[Array]:
        scores = [[torch.from_numpy(a) for a in each] for each in (self.pot.mass, self.pot.novelty)]
        mass, novelty = (each or None for each in scores)
        fill, count = (torch.tensor([n], dtype=torch.int32) for n in (self.pot.fill, keep))
        own = self.squeeze.choose(fill, count, self._keys, self._values, mass, novelty)
        out = self.squeeze.gather(self.decide(own, keep), self._keys, self._values, novelty)
        self.pot.replace(_arrays(out.keys), _arrays(out.values), _arrays(out.novelty), keep)
        return [kept[:, :keep].numpy() for kept in own]

    def decide(self, own: list[Tensor], keep: int) -> list[Tensor]:
        """The slots to keep, L x (Hkv, K) int32, of which `keep` count: the policy's own choice."""
        return own

    @torch.no_grad()
    def run_pass(
        self, ids: Array, width: int, *, observe: bool = False
    ) -> tuple[list[Array], list[Array], Tensor, list[Tensor]]:
        """New keys and values, logits and mass of one padded pass over the pot."""
        row = np.zeros((1, width), np.int32)
        padded(row, ids)
        weights = (torch.arange(width) < ids.size).float() if observe else None
        fill = torch.tensor([self.pot.fill], dtype=torch.int32)
        out = self.core.run(torch.from_numpy(row), fill, self._keys, self._values, weights)
        return _arrays(out.keys), _arrays(out.values), out.logits, out.mass


def _arrays(tensors: list[Tensor]) -> list[Array]:
    return [tensor.numpy() for tensor in tensors]
