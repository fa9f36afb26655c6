"""The model graph: a Hugging Face decoder over a pot, at any width.

One module serves prefill, decode and observe; they differ in the width of `input_ids` and in which
outputs are kept (`lower_onnx` prunes the rest), so that the model is traced once.

Nothing here knows a family by name. What one needs beyond this path is in a file of `adapters`;
how keys turn is measured (`turns`); and `PotModel` compares itself with the model it was made from
before anything is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.graphs import adapters, attention, experts, rope, turns
from potexport.graphs.codes import Codes
from potexport.graphs.in_place import Lengths
from potexport.graphs.turns import Turns
from potexport.spec import Layout

TOKENS = 24  # of the comparison with the model's own code, or all positions that there are
NEAR = {torch.float32: 1e-3, torch.float16: 0.05}  # of the largest logit
SAME = {torch.float32: 1e-3, torch.float16: 0.02}  # of a key's norm, once it is turned back


@dataclass(frozen=True)
class Outputs:
    """What one pass gives. Rows are in token order.

    keys: L tensors (1, Hkv, D, T); values: L tensors (1, Hkv, T, D); logits: (1, T, V) float32;
    mass: of each layer that is compressed (Hkv, M) float32, and new_mass: (Hkv, T) float32, what
        slots and tokens receive of the attention; empty without query weights.
    queries: L tensors (1, Hq, T, D), rotated; empty unless asked for.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor
    mass: list[Tensor]
    new_mass: list[Tensor]
    queries: list[Tensor]


class PotModel(nn.Module):
    """A transformers causal language model whose attention reads a pot.

    Takes over `model`: its attention implementation, its rotary modules and its experts are
    replaced.
    """

    def __init__(self, model: PreTrainedModel, facts: ModelFacts, geometry: PotGeometry) -> None:
        """Raises PotexportError for a model that would not compute the same over a pot."""
        super().__init__()
        tokens = _tokens(model, min(TOKENS, geometry.positions))
        wanted = _own_logits(model, tokens)
        tables = rope.by_tables(model, geometry.positions, model.dtype)
        adapters.adapt(model)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        experts.use(model)
        self.model = model
        self.facts, self.geometry = facts, geometry
        self._orders: list[turns.Order] = [()] * facts.layers  # as they are, until they are known
        self.turns = self._measure(tables)
        self._orders = self.turns.orders
        self._compare(tokens, wanted)

    @property
    def turn(self) -> Tensor:
        """The table of all layers, of a coded pot (`codes`)."""
        return self.turns.common

    def run(
        self,
        input_ids: Tensor,
        past_seq_len: Tensor,
        position: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        query_weights: Tensor | None = None,
        *,
        codes: Codes | None = None,
        want_queries: bool = False,
        in_place: bool = False,
    ) -> Outputs:
        """One pass over a pot (see `attention.Pass`).

        input_ids: (1, T) int32; past_seq_len: (1,) int32, or (L,) where layers have pots of
            different sizes; position: (1,) int32, of the first token. codes: of a coded pot, of
            which keys and values are a part. in_place: keys and values are (1, Hkv, S, D), written
            in place; to be exported, not to be run.
        """
        width = input_ids.shape[1]
        position_ids = (position + torch.arange(width, dtype=torch.int32))[None]
        spare = self.geometry.spare if in_place else 0
        step = attention.Pass(
            # Products of three dimensions: of four, ExecuTorch copies both sides to broadcast them.
            [_columns(key, in_place) for key in keys],
            [value.reshape(value.shape[1:]) for value in values],
            self._masks(past_seq_len, width, codes, spare=spare),
            self._orders,
            self.geometry,
            codes,
            self._row_weights(query_weights),
            queries={} if want_queries else None,
        )
        if in_place:
            lengths = Lengths.of(past_seq_len, width)
            step.in_place = list(zip(keys, values, strict=True)), lengths
        # The whole causal model, not its decoder and head: some scale or cap logits in between.
        with attention.over(step):
            logits = self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
        layers = range(len(keys))
        self._all_called(step)
        weighted = self.geometry.chosen(len(keys)) if query_weights is not None else []
        mass = step.mass
        if codes is not None:  # by slot, not by column
            floats = keys[0].shape[3]
            mass = {n: mass[n].index_select(1, codes.columns(n, floats)) for n in weighted}
        return Outputs(
            keys=[step.new_keys[layer] for layer in layers],
            values=[step.new_values[layer] for layer in layers],
            logits=logits.float(),
            mass=[mass[layer] for layer in weighted],
            new_mass=[step.new_mass[layer] for layer in weighted],
            queries=[step.queries[layer] for layer in layers] if step.queries else [],
        )

    @property
    def _group(self) -> int:
        """Query heads that share a key/value head."""
        return self.facts.query_heads // self.facts.kv_heads

    def _row_weights(self, query_weights: Tensor | None) -> Tensor | None:
        if query_weights is None:
            return None
        heads, group = self.facts.kv_heads, self._group
        return attention.row_weights(query_weights, kv_heads=heads, group=group)

    def _all_called(self, step: attention.Pass) -> None:
        called, layers = len(step.new_keys), self.facts.layers
        if called != layers:
            raise PotexportError(
                f"{called} of {layers} layers of {self.facts.model_type} call attention through "
                "transformers' interface; choose another model, or write an adapter "
                "(docs/models.md)"
            )

    def _masks(
        self, past_seq_len: Tensor, width: int, codes: Codes | None, spare: int
    ) -> list[Tensor]:
        """One for each layer; the same one where layers have as many slots and the same window.
        spare: rows of the pot behind its slots."""
        pot, made = self.geometry, {}

        def of(layer: int) -> Tensor:
            slots, window = pot.slots_of(layer) + spare, pot.window_of(layer)
            if (slots, window) not in made:
                order = None if codes is None else codes.order(layer, slots, width)
                made[slots, window] = attention.mask(
                    past_seq_len if pot.uniform else past_seq_len[layer : layer + 1],
                    slots=slots,
                    width=width,
                    group=self._group,
                    dtype=self.model.dtype,
                    order=order,
                    window=window,
                )
            return made[slots, window]

        return [of(layer) for layer in range(self.facts.layers)]

    def empty(self) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values of an empty pot."""
        specs = Layout(self.facts, self.geometry, frozenset()).past()
        made = [torch.zeros(spec.shape, dtype=self.model.dtype) for spec in specs]
        return made[0::2], made[1::2]

    @torch.no_grad()
    def _measure(self, tables: list[tuple[Tensor, Tensor]]) -> Turns:
        """How each layer turns its keys."""
        # Some rows are zeros, that of padding for one, and zeros turn in any way.
        token = _table(self.model).float().norm(dim=-1).argmax().to(torch.int32).reshape(1, 1)
        distance = self.geometry.positions - 1
        fill = torch.zeros(1 if self.geometry.uniform else self.facts.layers, dtype=torch.int32)
        zero, pot = torch.zeros(1, dtype=torch.int32), self.empty()
        near, far = (self.run(token, fill, zero + n, *pot).keys for n in (0, distance))
        if len({key.data_ptr() for key in near}) < len(near):
            raise PotexportError(
                f"{self.facts.model_type} has layers that read the keys of others; each must have "
                "its own"
            )
        return turns.measure(
            [key[0, :, :, 0].float() for key in near],
            [key[0, :, :, 0].float() for key in far],
            tables,
            distance=distance,
            within=SAME[self.model.dtype],
            model_type=self.facts.model_type,
        )

    @torch.no_grad()
    def _compare(self, ids: Tensor, wanted: Tensor) -> None:
        """Raise PotexportError unless logits over a pot are the model's own, (1, T, V) of ids
        (1, T): of a first pass, and of a second that reads its rows."""
        keys, values = self.empty()
        count = torch.zeros(1 if self.geometry.uniform else self.facts.layers, dtype=torch.int32)
        room, zero = min(value.shape[2] for value in values), torch.zeros(1, dtype=torch.int32)
        half = min(ids.shape[1] // 2, room)
        first = self.run(ids[:, :half], count, zero, keys, values)
        for layer in range(self.facts.layers):
            keys[layer][..., :half] = first.keys[layer]
            values[layer][:, :, :half] = first.values[layer]
        second = self.run(ids[:, half:], count + half, zero + half, keys, values)
        mine = torch.cat([first.logits, second.logits], dim=1)
        error = float((mine - wanted).abs().max() / wanted.abs().max())
        if not error <= NEAR[self.model.dtype]:
            raise PotexportError(
                f"{self.facts.model_type} does not compute the same over a pot: of "
                f"{ids.shape[1]} tokens the logits are off by {error:.1%} of the largest; its code "
                "does something to attention or positions that is not supported yet"
            )

    def novelty(self, logits: Tensor, next_ids: Tensor) -> Tensor:
        """-log p of the tokens that came next, in nats: (1, T, V), (1, T) int32 -> (1, T) float32.

        Source: arXiv 2410.01518, section 3.3 (novelty under compression).
        """
        # LogSoftmax and not logsumexp: NPU compilers take the first.
        return -torch.log_softmax(logits, dim=-1).gather(-1, next_ids[..., None].long())[..., 0]


def _columns(key: Tensor, in_place: bool) -> Tensor:
    """(Hkv, D, M), of a pot's keys."""
    key = key.reshape(key.shape[1:])
    return key.transpose(1, 2) if in_place else key


def _table(model: PreTrainedModel) -> Tensor:
    embedding: Any = model.get_input_embeddings()
    made: Tensor = embedding.weight
    return made


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """(1, count) int32, of all over the vocabulary."""
    made: Tensor = torch.arange(1, count + 1, dtype=torch.int32) * 7919 % _table(model).shape[0]
    return made[None]


@torch.no_grad()
def _own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(1, T, V) float32 of ids (1, T), by transformers' own attention and experts."""
    experts.one_by_one(model)
    own: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return own


class Superset(nn.Module):
    """Every input and output of the three model graphs at once: what is traced."""

    def __init__(self, core: PotModel, *, in_place: bool = False) -> None:
        super().__init__()
        self.core, self.in_place = core, in_place

    def forward(
        self,
        input_ids: Tensor,
        next_ids: Tensor,
        query_weights: Tensor,
        past_seq_len: Tensor,
        position: Tensor,
        pot: list[Tensor],
        coded: list[Tensor],
        positions: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """pot: key, value of layer 0, key, value of layer 1 ...; coded: the tensors of
        `Layout.codes`, with the positions of slots, if there are any; returns logits, novelty,
        of each chosen layer a mass, then a new mass, and L x (key, value)."""
        out = self.core.run(
            input_ids,
            past_seq_len,
            position,
            pot[0::2],
            pot[1::2],
            query_weights,
            codes=Codes.in_order(coded, positions, self.core.geometry.sink, self.core.turn),
            in_place=self.in_place,
        )
        rows = [row for pair in zip(out.keys, out.values, strict=True) for row in pair]
        novelty = self.core.novelty(out.logits, next_ids)
        return (out.logits, novelty, *out.mass, *out.new_mass, *rows)
