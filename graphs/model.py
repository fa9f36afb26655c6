"""The model graph: a Hugging Face decoder over a pot, at any width.

One module serves prefill, decode and observe; they differ in the width of `input_ids` and in which
outputs are kept (`lower_onnx` prunes the rest), so that the model is traced once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.graphs import attention
from potexport.graphs.codes import Codes
from potexport.graphs.rope import TableRotary, rotary_of, turn_back, turn_table


@dataclass(frozen=True)
class Outputs:
    """What one pass gives. Rows are in token order.

    keys: L tensors (1, Hkv, D, T); values: L tensors (1, Hkv, T, D); logits: (1, T, V) float32;
    mass: L tensors (Hkv, M) float32, and new_mass: L tensors (Hkv, T) float32, what slots and
        tokens receive of the attention; empty without query weights.
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

    Takes over `model`: its attention implementation and its rotary module are replaced.
    """

    def __init__(self, model: PreTrainedModel, geometry: PotGeometry) -> None:
        super().__init__()
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = model
        self.geometry = geometry
        self.query_heads: int = model.config.num_attention_heads
        rotary = rotary_of(model.base_model)
        name = next(name for name, child in model.base_model.named_children() if child is rotary)
        if isinstance(rotary, TableRotary):
            raise TypeError("this model was wrapped before; load it anew")
        self.turn = nn.Buffer(turn_table(rotary, geometry.positions))  # see `turn_table`
        setattr(model.base_model, name, TableRotary(rotary, geometry.positions, model.dtype))

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
    ) -> Outputs:
        """One pass over a pot (see `attention.Pass`).

        input_ids: (1, T) int32; past_seq_len: (1,) int32, or (L,) where layers have pots of
            different sizes; position: (1,) int32, of the first token. codes: of a coded pot, of
            which keys and values are a part.
        """
        width = input_ids.shape[1]
        position_ids = (position + torch.arange(width, dtype=torch.int32))[None]
        kv_heads = keys[0].shape[1]
        group = self.query_heads // kv_heads
        row_weights = (
            None
            if query_weights is None
            else attention.row_weights(query_weights, kv_heads=kv_heads, group=group)
        )
        step = attention.Pass(
            # Products of three dimensions: of four, ExecuTorch copies both sides to broadcast them.
            [key.reshape(key.shape[1:]) for key in keys],
            [value.reshape(value.shape[1:]) for value in values],
            self._masks(past_seq_len, width, group, len(keys), codes),
            self.geometry.positions,
            codes,
            row_weights,
            queries={} if want_queries else None,
        )
        # The whole causal model, not its decoder and head: some scale or cap logits in between.
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, pot=step
        ).logits
        layers = range(len(keys))
        weighted = layers if query_weights is not None else range(0)
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

    def _masks(
        self, past_seq_len: Tensor, width: int, group: int, layers: int, codes: Codes | None
    ) -> list[Tensor]:
        """One for each layer; the same one where all layers have as many slots."""

        def of(layer: int, fill: Tensor) -> Tensor:
            slots = self.geometry.slots_of(layer)
            order = None if codes is None else codes.order(layer, slots, width)
            return attention.mask(
                fill, slots=slots, width=width, group=group, dtype=self.model.dtype, order=order
            )

        if not self.geometry.shaped:
            return [of(0, past_seq_len)] * layers
        return [of(layer, past_seq_len[layer : layer + 1]) for layer in range(layers)]

    @torch.no_grad()
    def check_turn(self, facts: ModelFacts) -> None:
        """Raise PotexportError unless every layer's keys turn as context reset turns them.

        One token over an empty pot attends only to itself, so every layer sees the same hidden
        states wherever the token stands, and its keys at two positions must differ by the rotation
        alone.
        """
        pot = self.geometry
        keys = [
            torch.zeros(
                1, facts.kv_heads, facts.head_size, pot.slots_of(layer), dtype=self.model.dtype
            )
            for layer in range(facts.layers)
        ]
        values = [key.transpose(2, 3) for key in keys]
        token = torch.ones(1, 1, dtype=torch.int32)
        distance = pot.positions - 1
        zero = torch.zeros(1, dtype=torch.int32)
        fill = zero.expand(facts.layers if pot.shaped else 1)
        near = self.run(token, fill, zero, keys, values)
        far = self.run(token, fill, zero + distance, keys, values)
        by = self.turn[distance:].expand(facts.kv_heads, -1)
        for layer, (old, new) in enumerate(zip(far.keys, near.keys, strict=True)):
            turned = turn_back(old[0, :, :, 0].float(), by)
            wanted = new[0, :, :, 0].float()
            error = (turned - wanted).norm() / wanted.norm()
            if error > (0.02 if self.model.dtype == torch.float16 else 1e-3):
                raise PotexportError(
                    f"layer {layer} of {facts.model_type} does not rotate its keys as "
                    "expected (off by "
                    f"{error:.1%} over {distance} positions); partial, interleaved or absent "
                    "rotary positions are not supported yet"
                )

    def novelty(self, logits: Tensor, next_ids: Tensor) -> Tensor:
        """-log p of the tokens that came next, in nats: (1, T, V), (1, T) int32 -> (1, T) float32.

        Source: arXiv 2410.01518, section 3.3 (novelty under compression).
        """
        # LogSoftmax and not logsumexp: NPU compilers take the first.
        return -torch.log_softmax(logits, dim=-1).gather(-1, next_ids[..., None].long())[..., 0]


class Superset(nn.Module):
    """Every input and output of the three model graphs at once: what is traced."""

    def __init__(self, core: PotModel) -> None:
        super().__init__()
        self.core = core

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
        `Layout.codes`, with the positions of slots, if there are any; returns logits, novelty, L
        masses, L new masses, L x (key, value)."""
        out = self.core.run(
            input_ids,
            past_seq_len,
            position,
            pot[0::2],
            pot[1::2],
            query_weights,
            codes=Codes.in_order(coded, positions, self.core.geometry.sink, self.core.turn),
        )
        rows = [row for pair in zip(out.keys, out.values, strict=True) for row in pair]
        novelty = self.core.novelty(out.logits, next_ids)
        return (out.logits, novelty, *out.mass, *out.new_mass, *rows)
