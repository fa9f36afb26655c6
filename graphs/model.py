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
from potexport.graphs import attention
from potexport.graphs.rope import TableRotary, rotary_of, turn_back, turn_tables
from potexport.spec import ModelFacts, PotGeometry


@dataclass(frozen=True)
class Outputs:
    """What one pass gives. Rows are in token order.

    keys: L tensors (1, Hkv, D, T); values: L tensors (1, Hkv, T, D); logits: (1, T, V) float32;
    mass: L tensors (Hkv, M) float32, empty without query weights.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor
    mass: list[Tensor]


class PotModel(nn.Module):
    """A transformers causal language model whose attention reads a pot.

    Takes over `model`: its attention implementation and its rotary module are replaced.
    """

    def __init__(self, model: PreTrainedModel, geometry: PotGeometry) -> None:
        super().__init__()
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = model
        self.slots, self.positions = geometry.slots, geometry.positions
        self.query_heads: int = model.config.num_attention_heads
        rotary = rotary_of(model.base_model)
        name = next(name for name, child in model.base_model.named_children() if child is rotary)
        if isinstance(rotary, TableRotary):
            raise TypeError("this model was wrapped before; load it anew")
        self.turn = turn_tables(rotary, geometry.slots)
        setattr(model.base_model, name, TableRotary(rotary, geometry.positions, model.dtype))

    def run(
        self,
        input_ids: Tensor,
        past_seq_len: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        query_weights: Tensor | None = None,
        first_position: Tensor | None = None,
    ) -> Outputs:
        """One pass over a pot (see `attention.Pass`).

        input_ids: (1, T) int32; past_seq_len: (1,) int32; first_position: (1,) int32, behind the
            filled slots by default.
        """
        width = input_ids.shape[1]
        first = past_seq_len if first_position is None else first_position
        position_ids = (first + torch.arange(width, dtype=torch.int32))[None]
        kv_heads = keys[0].shape[1]
        group = self.query_heads // kv_heads
        mask = attention.mask(
            past_seq_len, slots=self.slots, width=width, group=group, dtype=keys[0].dtype
        )
        row_weights = (
            None
            if query_weights is None
            else attention.row_weights(query_weights, kv_heads=kv_heads, group=group)
        )
        step = attention.Pass(
            # Products of three dimensions: of four, ExecuTorch copies both sides to broadcast them.
            [key.reshape(key.shape[1:]) for key in keys],
            [value.reshape(value.shape[1:]) for value in values],
            mask,
            self.positions,
            row_weights,
        )
        # The whole causal model, not its decoder and head: some scale or cap logits in between.
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, pot=step
        ).logits
        layers = range(len(keys))
        return Outputs(
            keys=[step.new_keys[layer] for layer in layers],
            values=[step.new_values[layer] for layer in layers],
            logits=logits.float(),
            mass=[step.mass[layer] for layer in layers] if query_weights is not None else [],
        )

    @torch.no_grad()
    def check_turn(self, facts: ModelFacts) -> None:
        """Raise PotexportError unless every layer's keys turn as context reset turns them.

        One token over an empty pot attends only to itself, so every layer sees the same hidden
        states wherever the token stands, and its keys at two positions must differ by the rotation
        alone.
        """
        shape = (1, facts.kv_heads, facts.head_size, self.slots)
        keys = [torch.zeros(shape, dtype=self.model.dtype) for _ in range(facts.layers)]
        values = [key.transpose(2, 3) for key in keys]
        token = torch.ones(1, 1, dtype=torch.int32)
        distance = self.slots - 1
        empty = torch.zeros(1, dtype=torch.int32)
        near = self.run(token, empty, keys, values)
        far = self.run(token, empty, keys, values, first_position=empty + distance)
        cos, sin = (table[distance:] for table in self.turn)
        for layer, (old, new) in enumerate(zip(far.keys, near.keys, strict=True)):
            turned = turn_back(old[0, :, :, 0].float(), cos, sin)
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
        pot: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """pot: key, value of layer 0, key, value of layer 1 ...; returns logits, novelty, L masses,
        L x (key, value)."""
        out = self.core.run(input_ids, past_seq_len, pot[0::2], pot[1::2], query_weights)
        rows = [row for pair in zip(out.keys, out.values, strict=True) for row in pair]
        return (out.logits, self.core.novelty(out.logits, next_ids), *out.mass, *rows)
