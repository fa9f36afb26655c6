"""The loop once more, in the plainest words: the oracle of the parity tests.

It shares no code with the product and calls no forward pass of transformers: eager PyTorch, tensors
that grow, keys kept *un-rotated* and rotated afresh at each use, each at the position that it has.
So no re-rotation, no padding, no mask of free slots and no table that could be wrong in both.

Decides the arithmetic of Llama, Qwen2/3 and Mistral, when the loop compresses and when positions
begin anew; what is kept is `reference_policies`'.
Letters: L layers, E hidden size, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size,
V vocabulary, M slots, T chunk, n tokens of a pass, fill entries in the pot, m = fill + n. Query
head h reads key/value head h // G.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference_policies import RULES, Choice, Seen, choose

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Rope = tuple[Tensor, float | Tensor]  # angle per position of each pair, factor on cos and sin


def inverse_frequencies(model: nn.Module, head_size: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, [D/2] float64, and the factor on cos and sin.

    The default type is worked out from theta, rounded to float32 as every Llama's buffer is; the
    other types' values are the model's own buffer.
    """
    config: Any = model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        pairs = torch.arange(0, head_size, 2, dtype=torch.float64)
        return (float(rope["rope_theta"]) ** (-pairs / head_size)).float().double(), 1.0
    rotary: Any = model.get_submodule("model.rotary_emb")
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """Rotate-half RoPE. x [..., n, D], positions [..., n] integers -> [..., n, D].

    Pair i is (x[i], x[i + D/2]), turned by positions * inv_freq[i]; the angle is float64. The
    factor on cos and sin is one for all pairs, or [D/2].
    """
    angle = positions[..., None].double() * inv_freq  # [..., n, D/2]
    cos, sin = (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _turn(rope: Rope, x: Tensor, positions: Tensor) -> Tensor:
    """`rotate` without the factor on cos and sin."""
    return rotate(x, positions, rope[0])


class Entries(NamedTuple):
    """Entries of one layer. keys (un-rotated), values [Hkv, n, D]; of each [Hkv, n]: its novelty,
    the attention it received so far, and its position."""

    keys: Tensor
    values: Tensor
    novelty: Tensor
    received: Tensor
    positions: Tensor

    def followed_by(self, new: "Entries") -> "Entries":
        """These, then the new ones: [Hkv, n + new n, …]."""
        return Entries(*(torch.cat(pair, dim=1) for pair in zip(self, new, strict=True)))


@dataclass(eq=False)
class Reference:
    """A language model and its pot.

    Args:
        model: a transformers LlamaForCausalLM, or another of FAMILIES. Read of it are state_dict,
            config and, for rope types other than the default, the frequencies.
        slots: M. chunk: T. keep: entries left by a compression, unless `to_come` is known; then at
            most keep_max. sink, recent: first and last slots always kept.
        positions: where tokens may stand, and `widest`, how many a pass may have. A compression
            moves all to the front if the next one would find no room; None: each does.
        layer_slots: of each layer, M on average; a layer keeps as many more than others as it has.
        policy: one of RULES, with its settings.
        catalyst: token ids that score the pot; some rules need them. May be changed at any time.
        statistics: means [L, Hq, D] and covariances [L, Hq, D, D] of queries before rotation.
        dtype: of all arithmetic.
    Attributes:
        position: of the next token.
        chosen: the layers that fill up and are compressed, here all. What is listed by layer
            (`fills`, `novelty`, `mass`, `kept`, `margins`, layer_slots) is of these alone.
        kept: L of [Hkv, keep] int64 a compression: the slots kept, by their index before it.
        margins: one [L, Hkv] float64 a compression: Choice.margin of each head.
        resets: whether each compression moved all to the front.
    Deliberately broken variants, to show that a parity test can fail:
        no_reset: kept entries never move to the front, new ones follow as if they had.
        positions_left_behind: a compression leaves positions in their slots.
        mask_off_by_one: a token of a chunk, or of the catalyst, also sees the one after it.
        swap_keys_values: a compression exchanges (un-rotated) keys and values.
        novelty_left_behind: a compression leaves novelty in its slot instead of moving it.
        shared_heads: every head keeps what head 0 of its layer keeps.
    """

    model: nn.Module
    _: KW_ONLY
    slots: int
    chunk: int
    keep: int
    keep_max: int
    sink: int
    recent: int
    policy: str
    positions: int | None = None
    widest: int = 0
    layer_slots: Sequence[int] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    catalyst: Sequence[int] | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    dtype: torch.dtype = torch.float32
    no_reset: bool = False
    positions_left_behind: bool = False
    mask_off_by_one: bool = False
    swap_keys_values: bool = False
    novelty_left_behind: bool = False
    shared_heads: bool = False

    def __post_init__(self) -> None:
        """Check the numbers, take the weights, make an empty pot."""
        if self.policy not in RULES:
            raise ValueError(f"want a policy of {list(RULES)}")
        highest = min(self.keep_max, self.slots - self.chunk)
        if not self.sink + self.recent <= self.keep <= highest:
            raise ValueError("want sink + recent <= keep <= keep_max, and keep + chunk <= slots")
        self._load(self.model)
        self.position = 0
        self.kept: list[list[Tensor]] = []
        self.margins: list[Tensor] = []
        self.resets: list[bool] = []
        self._next_logits: Tensor | None = None  # [V], after the last token read
        # Of each token since the last compression, for each layer: its attention [Hkv, G, m].
        self._rows: list[list[Tensor]] = [[] for _ in range(self._layers)]

    def _load(self, model: nn.Module) -> None:
        """Take weights and geometry from the model, and make an empty pot.

        After it there are `chosen`, _layers, _kv_heads, _groups, _head_size, and _ropes of each
        layer.
        """
        config: Any = model.config
        windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if config.model_type not in FAMILIES or config.hidden_act != "silu" or windows:
            raise ValueError(f"the reference does not know {config.model_type}, {windows}")
        weights: dict[str, Tensor] = model.state_dict()
        self._weights = {name: weight.to(self.dtype) for name, weight in weights.items()}
        self._eps = float(config.rms_norm_eps)
        self._layers = int(config.num_hidden_layers)
        self._kv_heads = int(config.num_key_value_heads)
        self._groups = int(config.num_attention_heads) // self._kv_heads
        key_rows = self._weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
        self._head_size = key_rows // self._kv_heads
        self._ropes: list[Rope] = [inverse_frequencies(model, self._head_size)] * self._layers
        self.chosen = list(range(self._layers))
        self._empty()

    def _empty(self) -> None:
        """Make an empty pot."""
        rows = torch.zeros(self._kv_heads, 0, self._head_size, dtype=self.dtype)
        none = rows[..., 0]
        empty = Entries(rows, rows, none, none, none.long())
        self._pot = [empty] * self._layers

    @property
    def fill(self) -> int:
        """Entries in the pot, the same in every head; of the layer with the most."""
        return max(self.fills)

    @property
    def fills(self) -> list[int]:
        """Entries of each layer."""
        return [self._pot[layer].keys.shape[1] for layer in self.chosen]

    @property
    def novelty(self) -> list[Tensor]:
        """For each layer [Hkv, fill], nats: the surprise of each entry's token when it was read."""
        return [self._pot[layer].novelty for layer in self.chosen]

    def keys(self, layer: int) -> Tensor:
        """[Hkv, fill, D], rotated at their present positions."""
        return rotate(self._pot[layer].keys, self._pot[layer].positions, *self._ropes[layer])

    def values(self, layer: int) -> Tensor:
        """[Hkv, fill, D]."""
        return self._pot[layer].values

    def read(self, ids: Sequence[int], to_come: int | None = None) -> Tensor:
        """Read a prompt: all but the last in chunks, the last alone -> its logits [V].

        `to_come`: how many tokens are known to follow these; None if that is not known, and then
        every compression keeps exactly `keep`.
        """
        later = math.inf if to_come is None else to_come
        for start in range(0, len(ids) - 1, self.chunk):
            tokens = list(ids[:-1])[start : start + self.chunk]
            self._take(tokens, len(ids) - start + later)
        return self._take([ids[-1]], 1 + later)

    def decode(self, token: int) -> Tensor:
        """Read one token -> the logits [V] of the next."""
        return self._take([token], math.inf)

    def _take(self, tokens: list[int], remaining: float) -> Tensor:
        """Make room for the tokens, read them, store them -> logits [V] after the last.

        `remaining`: tokens to be read from here on, these included; infinite if not known.
        """
        sizes = self.layer_slots or [self.slots] * len(self.chosen)
        if any(fill + len(tokens) > size for fill, size in zip(self.fills, sizes, strict=True)):
            self.compress(int(min(self.keep_max, max(self.keep, self.slots - remaining))))
        logits, news, attention = self._run(tokens)
        novelty = self._surprises(tokens, logits).expand(self._kv_heads, -1)
        for layer, (pot, new) in enumerate(zip(self._pot, news, strict=True)):
            fill = pot.keys.shape[1]
            received = attention[layer].mean(dim=1).sum(dim=1)  # [Hkv, m]
            old = pot._replace(received=pot.received + received[:, :fill])
            new = new._replace(novelty=novelty, received=received[:, fill:])
            self._pot[layer] = old.followed_by(new)
            if layer in self.chosen:
                self._rows[layer] += attention[layer].unbind(dim=2)
        self.position += len(tokens)
        self._next_logits = logits[-1]
        return logits[-1]

    def _surprises(self, tokens: list[int], logits: Tensor) -> Tensor:
        """-log p of each token [n], from the logits [n, V] of the pass that read the one before.

        For the first of the tokens that is the pass before; the first token ever surprises by 0.
        """
        first = logits.new_zeros(1)
        if self._next_logits is not None:
            first = -self._next_logits.log_softmax(dim=-1)[tokens[:1]]
        rest = -logits[:-1].log_softmax(dim=-1)  # [n - 1, V]
        return torch.cat((first, rest[torch.arange(len(tokens) - 1), tokens[1:]]))

    def compress(self, keep: int) -> None:
        """Keep `keep` entries a layer and head, in their order."""
        more = [size - self.slots for size in self.layer_slots] or [0] * len(self.chosen)
        if not self.sink + self.recent - min(more) <= keep <= self.fill - min(more):
            raise ValueError(f"cannot keep {keep} of {self.fill} entries")
        keeps = [min(keep + m, fill) for m, fill in zip(more, self.fills, strict=True)]
        none = [torch.zeros_like(novelty) for novelty in self.novelty]
        masses = self.mass() if self.catalyst else none
        layers = zip(self.chosen, masses, keeps, strict=True)
        choices = [self._choose(*each) for each in layers]
        kept = [torch.tensor([head.kept for head in layer]) for layer in choices]
        next_end = self.position + self.slots - keep + self.widest
        reset = self.positions is None or next_end > self.positions
        for layer, idx in zip(self.chosen, kept, strict=True):
            self._pot[layer] = self._gather(self._pot[layer], idx, reset=reset)
            self._rows[layer] = []
        if reset:
            self._move_others(self.fill - self.position)
            self.position = self.fill
        self.kept.append(kept)
        self.resets.append(reset)
        margins = [[head.margin for head in layer] for layer in choices]
        self.margins.append(torch.tensor(margins, dtype=torch.float64))

    def _move_others(self, distance: int) -> None:
        """Move the layers that are not chosen as far as the next token moves; here there are none.

        So each token to come is as far from what they hold as it would have been.
        """

    def mass(self) -> list[Tensor]:
        """Attention of the catalyst to each entry: L of [Hkv, fill].

        Summed over the catalyst's tokens, averaged over the query heads of a group. The catalyst
        stands where the next token would, sees the pot and causally itself, and is not stored.
        """
        _, _, probabilities = self._run(list(self.catalyst or ()))  # L of [Hkv, G, n, m]
        fills = zip(self.chosen, self.fills, strict=True)
        return [probabilities[i][..., :fill].sum(dim=2).mean(dim=1) for i, fill in fills]

    def _choose(self, layer: int, mass: Tensor, keep: int) -> list[Choice]:
        """What each head of a layer keeps: Hkv choices. mass [Hkv, fill]."""
        if self.policy in ("infinipot", "catalyst") and not self.catalyst:
            raise ValueError("the policy needs a catalyst, and there is none")
        pot, turn = self._pot[layer], partial(_turn, self._ropes[layer])
        statistics = self.statistics
        seen = Seen(
            layer,
            self.sink,
            self.recent,
            pot.keys,
            self.keys(layer),
            pot.values,
            pot.novelty,
            pot.received,
            self._rows[layer],
            mass,
            self.position,
            (statistics[0][layer], statistics[1][layer]) if statistics else None,
            turn,
        )
        tiers = RULES[self.policy](seen, keep, **self.settings)
        rows = [
            [(tier.scores[head].tolist(), tier.most, tier.pooled) for tier in tiers]
            for head in range(self._kv_heads)
        ]
        choices = [choose(row, keep=keep, sink=self.sink, recent=self.recent) for row in rows]
        return choices[:1] * self._kv_heads if self.shared_heads else choices

    def _gather(self, pot: Entries, idx: Tensor, *, reset: bool) -> Entries:
        """The entries idx [Hkv, keep] of one layer; if `reset` at positions 0, 1, 2, …"""
        heads, keep = idx.shape
        rows = idx[..., None].expand(-1, -1, self._head_size)
        keys, values = pot.keys.gather(1, rows), pot.values.gather(1, rows)
        novelty, received = pot.novelty.gather(1, idx), pot.received.gather(1, idx)
        positions = pot.positions.gather(1, idx)
        if reset and not self.no_reset:
            positions = torch.arange(keep).expand(heads, -1)
        elif self.positions_left_behind:
            positions = pot.positions[:, :keep]
        if self.swap_keys_values:
            keys, values = values, keys
        if self.novelty_left_behind:
            novelty = pot.novelty[:, :keep]
        return Entries(keys, values, novelty, received, positions)

    def _run(self, tokens: list[int]) -> tuple[Tensor, list[Entries], list[Tensor]]:
        """Run tokens over the pot, storing nothing; the first stands at `position`.

        Returns: the logits [n, V]; the tokens' entries, one a layer, novelty 0; the
        attention probabilities, one [Hkv, G, n, m] a layer.
        """
        places = torch.arange(self.position, self.position + len(tokens))  # [n]
        x = self._weights["model.embed_tokens.weight"][torch.tensor(tokens)]  # [n, E]
        news, probabilities = [], []
        for layer in range(self._layers):
            name = f"model.layers.{layer}"
            normed = self._norm(f"{name}.input_layernorm", x)
            query, new = self._project(f"{name}.self_attn", normed, places)
            visible = self._pot[layer].followed_by(new)
            probability = self._attend(layer, query, visible, places)
            mixed = probability @ visible.values[:, None]  # [Hkv, G, n, D]
            mixed = mixed.flatten(0, 1).transpose(0, 1).flatten(1)  # [n, Hq * D]
            x = x + self._linear(f"{name}.self_attn.o_proj", mixed)
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x))
            news.append(new)
            probabilities.append(probability)
        return self._logits(x), news, probabilities

    def _project(self, name: str, x: Tensor, places: Tensor) -> tuple[Tensor, Entries]:
        """x [n, E] -> query [Hkv, G, n, D] un-rotated, and the tokens' entries."""
        heads = (len(places), -1, self._head_size)
        query, key, value = (self._linear(f"{name}.{p}_proj", x).view(heads) for p in "qkv")
        if f"{name}.q_norm.weight" in self._weights:  # Qwen3
            query, key = self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key)
        query = query.transpose(0, 1).reshape(self._kv_heads, self._groups, *heads[::2])
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        positions = places.expand(self._kv_heads, -1)
        nothing = torch.zeros_like(key[..., 0])
        return query, Entries(key, value, nothing, nothing, positions)

    def _attend(self, layer: int, query: Tensor, visible: Entries, places: Tensor) -> Tensor:
        """query [Hkv, G, n, D] at places [n] -> probabilities over pot and chunk [Hkv, G, n, m]."""
        query = rotate(query, places, *self._ropes[layer])
        key = rotate(visible.keys, visible.positions, *self._ropes[layer])[:, None]
        scores = query @ key.transpose(-1, -2) / math.sqrt(self._head_size)  # [Hkv, G, n, m]
        own = torch.arange(key.shape[2] - len(places), key.shape[2])  # [n]: place in the list
        hidden = torch.arange(key.shape[2]) > own[:, None] + int(self.mask_off_by_one)  # [n, m]
        return scores.masked_fill(hidden, -math.inf).softmax(dim=-1)

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        """SwiGLU. [n, E] -> [n, E]."""
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", functional.silu(gate) * up)

    def _logits(self, x: Tensor) -> Tensor:
        """Last layer's output [n, E] -> [n, V]; a missing head is the embedding."""
        head = self._weights.get("lm_head.weight", self._weights["model.embed_tokens.weight"])
        return functional.linear(self._norm("model.norm", x), head)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """[n, in] -> [n, out], with a bias if the model has one."""
        return functional.linear(
            x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        )

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension; the shape stays."""
        mean_square: Tensor = x.pow(2).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self._eps) * self._weights[f"{name}.weight"]
