"""The loop in PyTorch, eagerly: the same modules that are exported, behind the runtime's interface.

It shares the session and the pot with the runtime, and nothing with ONNX. What it proves is that
export and graph runtime change nothing; that the modules themselves are right is shown by the
tests' own reference, which shares nothing with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from potexport.bundle import PolicyFacts
from potexport.graphs.codes import Codes, Stored
from potexport.graphs.compress import Compress, Given
from potexport.graphs.model import Outputs, PotModel
from potexport.graphs.policies import Policy
from potexport.runtime.backend import Array, kept_counts, moved_back, padded
from potexport.runtime.coded_pot import CodedPot, KeyFacts, make_pot
from potexport.spec import Layout


class TorchBackend:
    """Runs a wrapped transformers model; see `runtime.backend.Backend` for each method."""

    def __init__(
        self,
        core: PotModel,
        policies: Sequence[tuple[PolicyFacts, Policy]],
        layout: Layout,
        statistics: tuple[Tensor, Tensor] | None = None,
        key_facts: KeyFacts | None = None,
    ) -> None:
        """policies: the first is used until `policy` is set. statistics: of queries, for policies
        that need them. key_facts: for a coded pot."""
        layout = replace(layout, in_place=False)  # which is an affair of the graphs
        self.core, self.layout = core, layout
        self._made_of = (core, policies, layout, statistics, key_facts)
        self._squeeze = {
            facts.label: Compress(
                each, layout.pot, core.turns, statistics if "queries" in facts.needs else None
            )
            for facts, each in policies
        }
        self.policy = policies[0][0]
        self.pot = make_pot(layout, key_facts)
        # Tensors over the pot's own arrays: what the pot appends, the model sees.
        self._keys = [torch.from_numpy(array) for array in self.pot.keys]
        self._values = [torch.from_numpy(array) for array in self.pot.values]
        self._positions = [torch.from_numpy(array) for array in self.pot.positions]

        held = [torch.from_numpy(array) for array in self.pot.held.values()]
        self._codes = Codes.in_order(held, self._positions, layout.pot.sink, core.turn)

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        width = self.layout.pot.chunk
        out = self.run_pass(ids, width, weigh=self._received)
        novelty = np.zeros(ids.size + 1, np.float32)
        if "novelty" in self.layout.gathered:
            wanted = np.zeros((1, width), np.int32)
            padded(wanted, next_ids)
            found = self.core.novelty(out.logits, torch.from_numpy(wanted))
            novelty[0] = first_novelty
            novelty[1:] = found[0, : ids.size].numpy()
        self._append(out, novelty[:-1], ids.size)
        return float(novelty[-1])

    def decode(self, token: int, novelty: float) -> Array:
        out = self.run_pass(np.array([token], np.int32), 1, weigh=self._received)
        self._append(out, novelty, 1)
        row: Array = out.logits[0, 0].numpy()
        return row

    def observe(self, ids: Array, *, back: int = 0, into: str = "mass") -> None:
        out = self.run_pass(ids, self.layout.pot.catalyst_width, weigh=True, back=back)
        for array, tensor in zip(self.pot.scores[into], out.mass, strict=True):
            array[...] = tensor.numpy()

    @torch.no_grad()
    def compress(self, keep: int, *, reset: bool = True) -> list[Array]:
        squeeze = self._squeeze[self.policy.label]
        counts = kept_counts(self.pot, self.layout.pot, keep)
        self.pot.ready()
        stored = None
        keys: Sequence[Tensor] = [self._keys[n] for n in self.layout.chosen]
        values: Sequence[Tensor] = [self._values[n] for n in self.layout.chosen]
        if self._codes is not None and isinstance(self.pot, CodedPot):
            coded = torch.from_numpy(self.pot.coded(counts))
            stored = Stored(self._codes, self._keys, self._values, coded)
            keys, values = stored.in_order()
        given = Given(
            torch.from_numpy(self.pot.fills.copy()),
            torch.from_numpy(counts),
            torch.tensor([self.pot.pinned], dtype=torch.int32),
            torch.tensor([int(reset)], dtype=torch.int32),
            self._positions,
            keys,
            values,
            {
                name: [torch.from_numpy(array) for array in each]
                for name, each in self.pot.scores.items()
                if name in self.policy.needs
            },
            torch.tensor([self.pot.position], dtype=torch.int32),
            stored,
            [self._keys[n] for n in self.layout.windowed],
            torch.tensor([moved_back(self.pot, counts, reset=reset)], dtype=torch.int32),
        )
        own = squeeze.choose(given)
        decided = self.decide(own, counts)
        out = squeeze.gather(decided, given)
        kept = _arrays(decided)
        self.pot.replace(
            _arrays(out.keys),
            _arrays(out.values),
            kept,
            counts,
            reset=reset,
            coded=[tuple(tensor.numpy() for tensor in each) for each in out.coded],
            last=_arrays(out.last),
        )
        sizes = self.pot.counts_of(counts)
        return [slots[:, :count].numpy() for slots, count in zip(own, sizes, strict=True)]

    def decide(self, own: list[Tensor], counts: Array) -> list[Tensor]:
        """The slots to keep, of each chosen layer (Hkv, K) int32, of which `counts` count: the
        policy's own choice."""
        return own

    @torch.no_grad()
    def run_pass(
        self,
        ids: Array,
        width: int,
        *,
        weigh: bool = False,
        back: int = 0,
        want_queries: bool = False,
    ) -> Outputs:
        """One padded pass over the pot, or all of it but the last `back` slots.

        weigh: also what slots and tokens receive of its attention.
        """
        self.pot.ready()
        row = np.zeros((1, width), np.int32)
        padded(row, ids)
        weights = (torch.arange(width) < ids.size).float() if weigh else None
        fill = torch.from_numpy(np.maximum(self.pot.fills - back, 0))
        position = torch.tensor([self.pot.position - back], dtype=torch.int32)
        return self.core.run(
            torch.from_numpy(row),
            fill,
            position,
            self._keys,
            self._values,
            weights,
            codes=self._codes,
            want_queries=want_queries,
        )

    def fork(self) -> TorchBackend:
        twin = TorchBackend(*self._made_of)
        twin.policy = self.policy
        return twin

    @property
    def _received(self) -> bool:
        return "received" in self.layout.gathered

    def _append(self, out: Outputs, novelty: Array | float, count: int) -> None:
        if self._received:
            self.pot.receive(_arrays(out.mass), _arrays(out.new_mass), count)
        self.pot.append(_arrays(out.keys), _arrays(out.values), novelty, count)


def _arrays(tensors: list[Tensor]) -> list[Array]:
    return [tensor.numpy() for tensor in tensors]
