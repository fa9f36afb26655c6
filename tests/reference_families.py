"""The oracle for families whose layers are not Llama's: transformers' own, but for attention.

Projections, norms, MLPs, experts and logits are transformers' code. Its rotary modules are made to
turn nothing, and its attention is replaced: queries and keys arrive here un-rotated, and what
becomes of them is the oracle's own, as in `reference`. So a family that is wired together wrongly
in the product is told apart, and so is one that turns, masks or caps wrongly.

Decides how each family turns (TABLE, from papers and configurations, never measured), which layers
have a window, and what they see. Shares no code with the product.
Letters are `reference`'s, and R: how many elements of a head turn. Keys are in the pot's order
wherever they are seen: elements i and i + D/2 turn together if i < R/2, the others do not turn.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tests.reference import Entries, Reference, Rope, rotate

NAME = "potexport-oracle"  # of the attention, to transformers


@dataclass(frozen=True)
class Turning:
    """How a family turns its queries and keys.

    pairs: which elements turn together, "half" (i and i + R/2) or "interleaved" (2i and 2i + 1).
    partial: whether only the first R = D * partial_rotary_factor elements turn, or all.
    by_type: whether each type of layer has frequencies of its own.
    still: layers that do not turn: none (""), those with a 0 in no_rope_layers ("listed"), or those
        without a window in a model that has one ("global").
    """

    pairs: str = "half"
    partial: bool = False
    by_type: bool = False
    still: str = ""


WHOLE, PART = Turning(), Turning(partial=True)
TABLE: dict[str, Turning] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"), WHOLE),
    **dict.fromkeys(("gemma", "gemma2", "granite", "olmo2", "olmoe", "starcoder2"), WHOLE),
    **dict.fromkeys(("ministral", "seed_oss", "arcee", "apertus"), WHOLE),
    "falcon": WHOLE,  # 2311.16867; where it has no ALiBi
    "gemma3_text": Turning(by_type=True),  # 2503.19786: base 10k in local layers, 1M in global
    "olmo3": Turning(by_type=True),
    "gpt_oss": WHOLE,
    "smollm3": Turning(still="listed"),  # 2501.18795, RNoPE: every fourth layer
    "exaone4": Turning(still="global"),  # 2507.11407
    "cohere2": Turning("interleaved", still="global"),  # 2504.00698
    "cohere": Turning("interleaved"),
    "helium": Turning("interleaved"),
    "ernie4_5": Turning("interleaved"),
    "glm": Turning("interleaved", partial=True),  # 2406.12793: half of each head
    "glm4": Turning("interleaved", partial=True),
    "gpt_neox": PART,  # 2204.06745: the first quarter
    "phi": PART,
    "phi3": PART,  # all of it, but for Phi-4-mini: 2503.01743
    "stablelm": PART,
    "nemotron": PART,  # 2402.16819
}


def pot_order(turning: Turning, turned: int, head_size: int) -> list[int]:
    """Where each element of the pot's order stands in the model's. `turned`: R, may be 0."""
    half, rest = turned // 2, list(range(turned, head_size))
    if turning.pairs == "half":
        first, second = range(half), range(half, turned)
    else:
        first, second = range(0, turned, 2), range(1, turned, 2)
    return [*first, *rest[: len(rest) // 2], *second, *rest[len(rest) // 2 :]]


def windows_of(config: Any) -> list[int | None]:
    """The window of each layer: how many tokens a query sees, itself included; None for all."""
    width = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [width] * int(config.num_hidden_layers)
    if set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"the reference does not know layers of {set(types)}")
    return [width if kind == "sliding_attention" else None for kind in types]


def is_still(turning: Turning, config: Any, layer: int) -> bool:
    """Whether a layer has no rotary embedding at all."""
    if turning.still == "listed":
        return not config.no_rope_layers[layer]
    if turning.still == "global":
        return config.sliding_window is not None and windows_of(config)[layer] is None
    return False


def frequencies(
    turning: Turning, config: Any, rotary: Any, layer: int, head_size: int
) -> tuple[Tensor, float]:
    """Angle per position of each pair that turns, [R/2] float64, and the factor on cos and sin.

    The default type is worked out from theta, rounded to float32 as the buffers are; the other
    types' values are the buffer as it was built, which for LongRoPE is that of short texts.
    """
    rope, prefix = config.rope_parameters, ""
    if turning.by_type:
        kind = config.layer_types[layer]
        rope, prefix = rope[kind], f"{kind}_"
    if rope.get("rope_type", "default") == "default":
        share = rope["partial_rotary_factor"] if turning.partial else 1.0
        turned = int(head_size * share)
        pairs = torch.arange(0, turned, 2, dtype=torch.float64)
        return (float(rope["rope_theta"]) ** (-pairs / turned)).float().double(), 1.0
    inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
    return inv_freq.double(), float(getattr(rotary, f"{prefix}attention_scaling"))


def kv_heads_of(config: Any) -> int:
    """Hkv. A Falcon that shares one head among all says so apart; GPT-NeoX shares none."""
    heads = int(config.num_attention_heads)
    if config.model_type == "falcon":
        one = config.multi_query and not config.new_decoder_architecture
        return 1 if one else int(config.num_kv_heads)
    return int(getattr(config, "num_key_value_heads", None) or heads)


class Still(nn.Module):
    """A rotary module that turns nothing: cos is 1 and sin is 0, in the shapes of the other's."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **known: Any
) -> tuple[Tensor, None]:
    """transformers' interface. query [1, Hq, n, D], key and value [1, Hkv, n, D] -> [1, n, Hq, D].

    What else is known, the window among it, the oracle knows better.
    """
    oracle: FamilyReference = module.oracle
    mixed = oracle.attend(
        module.layer_idx,
        query[0],
        key[0],
        value[0],
        scaling=known["scaling"],
        softcap=known.get("softcap"),
        sinks=known.get("s_aux"),
    )
    return mixed[None], None


def _falcon_attention(module: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    """FalconAttention, which asks no interface. [1, n, E] -> [1, n, E].

    Its fused rows are, for each key/value head: its G query heads, its key, its value. transformers
    copies keys and values to all query heads; the pot holds each once.
    """
    kv_heads, size = module.num_kv_heads, module.head_dim
    fused = module.query_key_value(x)[0].view(x.shape[1], kv_heads, -1, size).transpose(0, 1)
    query = fused[:, :, :-2].transpose(1, 2).flatten(0, 1)  # [Hq, n, D]
    mixed = module.oracle.attend(
        module.layer_idx, query, fused[:, :, -2], fused[:, :, -1], scaling=size**-0.5
    )
    return module.dense(mixed.flatten(1))[None], None


@dataclass(eq=False)
class FamilyReference(Reference):
    """A language model of any family in TABLE, and its pot.

    A layer is windowed if its window is smaller than `positions` (or if these are None). It keeps
    all entries for ever and hides the old ones by age, counted in tokens read. The others are
    `chosen`. Statistics of queries are in the pot's order. Some norms of transformers compute in
    float32 whatever the dtype.
    """

    turning: Turning | None = None  # of the family, unless a test wants a wrong one

    def _load(self, model: nn.Module) -> None:
        self._model: Any = copy.deepcopy(model).to(self.dtype).eval()
        config: Any = self._model.config
        if config.model_type not in TABLE or getattr(config, "alibi", False):
            raise ValueError(f"the reference does not know {config.model_type}")
        heads = int(config.num_attention_heads)
        self._layers = int(config.num_hidden_layers)
        self._kv_heads = kv_heads_of(config)
        self._groups = heads // self._kv_heads
        self._head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        limit = math.inf if self.positions is None else self.positions
        self._windows = [w if w is not None and w < limit else None for w in windows_of(config)]
        self.chosen = [layer for layer, width in enumerate(self._windows) if width is None]
        if not self.chosen:
            raise ValueError("every layer has a window: there is nothing to compress")
        self._learn_turning(config)
        self._take_over(config)
        self._empty()

    def _learn_turning(self, config: Any) -> None:
        """Of each layer, how the pot's order comes about, and its rotation in that order."""
        turning = self.turning or TABLE[config.model_type]
        rotary = next(m for m in self._model.modules() if "RotaryEmbedding" in type(m).__name__)
        self._orders, self._ropes = [], []
        for layer in range(self._layers):
            inv_freq, factor = frequencies(turning, config, rotary, layer, self._head_size)
            if is_still(turning, config, layer):
                inv_freq = inv_freq[:0]
            turned = len(inv_freq)
            self._orders.append(pot_order(turning, 2 * turned, self._head_size))
            angles = torch.zeros(self._head_size // 2, dtype=torch.float64)
            factors = torch.ones_like(angles)
            angles[:turned], factors[:turned] = inv_freq, factor
            rope: Rope = (angles, factors)
            self._ropes.append(rope)

    def _take_over(self, config: Any) -> None:
        """Put the oracle's attention into the model, and rotations that do not turn."""
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        config._attn_implementation = NAME
        config._experts_implementation = "eager"  # each expert in turn
        for module in list(self._model.modules()):
            for name, child in list(module.named_children()):
                if "RotaryEmbedding" in type(child).__name__:
                    setattr(module, name, Still(child))
                elif type(child).__name__.endswith("Attention"):
                    child.oracle = self
                if type(child).__name__ == "FalconAttention":
                    child.forward = partial(_falcon_attention, child)

    def _run(self, tokens: list[int]) -> tuple[Tensor, list[Entries], list[Tensor]]:
        self._places = torch.arange(self.position, self.position + len(tokens))  # [n]
        self._news: dict[int, Entries] = {}
        self._shares: dict[int, Tensor] = {}
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        layers = range(self._layers)
        return logits, [self._news[i] for i in layers], [self._shares[i] for i in layers]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One layer's attention over the pot and the tokens of this pass, whose entries it notes.

        query [Hq, n, D], key, value [Hkv, n, D], as the model has them but un-rotated
        -> [n, Hq, D].
        """
        order, rope = self._orders[layer], self._ropes[layer]
        count = len(self._places)
        nothing = torch.zeros_like(key[..., 0])
        positions = self._places.expand(self._kv_heads, -1)
        new = Entries(key[..., order], value, nothing, nothing, positions)
        visible = self._pot[layer].followed_by(new)
        turned = rotate(query[..., order], self._places, *rope)
        turned = turned.reshape(self._kv_heads, self._groups, count, self._head_size)
        keys = rotate(visible.keys, visible.positions, *rope)[:, None]  # [Hkv, 1, m, D]
        scores = turned @ keys.transpose(-1, -2) * scaling  # [Hkv, G, n, m]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = self._hidden(layer, count, keys.shape[2])
        scores = scores.masked_fill(hidden, -math.inf)
        most = scores.amax(dim=-1, keepdim=True)
        weights = (scores - most).exp()
        total = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:  # [Hq], of gpt-oss: takes its share and gives nothing
            total = total + (sinks.reshape(self._kv_heads, self._groups, 1, 1) - most).exp()
        share = weights / total
        self._news[layer], self._shares[layer] = new, share
        mixed = share @ visible.values[:, None]  # [Hkv, G, n, D]
        return mixed.flatten(0, 1).transpose(0, 1)

    def _hidden(self, layer: int, count: int, entries: int) -> Tensor:
        """What the last `count` of all entries do not see: [n, m].

        An entry's age is how many tokens were read after it: a windowed layer has lost none.
        """
        age = torch.arange(entries - count, entries)[:, None] - torch.arange(entries)
        hidden = age < -int(self.mask_off_by_one)
        width = self._windows[layer]
        return hidden if width is None else hidden | (age >= width)

    def _move_others(self, distance: int) -> None:
        if self.no_reset:
            return
        for layer in set(range(self._layers)) - set(self.chosen):
            pot = self._pot[layer]
            self._pot[layer] = pot._replace(positions=pot.positions + distance)

    def tail(self, layer: int, count: int) -> Sequence[Tensor]:
        """Keys, rotated, and values of the newest `count` entries of a layer: 2 of [Hkv, n, D]."""
        first = max(0, self._pot[layer].keys.shape[1] - count)
        return self.keys(layer)[:, first:], self.values(layer)[:, first:]
