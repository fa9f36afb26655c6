"""The loop once more, in the plainest words: the oracle of the parity tests.

It shares no code with the product and calls no forward pass of transformers: eager PyTorch, tensors
that grow, keys kept *un-rotated* and rotated afresh at each use with position = place in the list.
So no re-rotation, no padding, no mask of free slots and no table that could be wrong in both.

Decides the arithmetic of Llama, Qwen2/3 and Mistral, when the loop compresses, what is kept.
Letters: L layers, E hidden size, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size,
V vocabulary, M slots, T chunk, n tokens of a pass, fill entries in the pot, m = fill + n. Query
head h reads key/value head h // G.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

POLICIES = ("infinipot", "streaming", "keydiff")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Row = list[float]  # one number for each occupied slot (fill of them), of one layer and head


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


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> Tensor:
    """Rotate-half RoPE. x [..., n, D], positions [..., n] integers -> [..., n, D].

    Pair i is (x[i], x[i + D/2]), turned by positions * inv_freq[i]; the angle is float64.
    """
    angle = positions[..., None].double() * inv_freq  # [..., n, D/2]
    cos, sin = (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class Choice:
    """What one head keeps: slots in ascending order, and how near the choice was to a tie.

    `margin` is the smallest relative gap, |a - b| / max(|a|, |b|), at the borders that decided:
    last kept against first dropped of one tier; for InfiniPot also last novel against first not
    novel. It is infinite where no two scores were compared.
    """

    kept: list[int]
    margin: float


def split(fill: int, *, sink: int, recent: int) -> tuple[list[int], list[int]]:
    """The slots kept whatever their score, the first `sink` and last `recent`; and the others."""
    forced = [s for s in range(fill) if s < sink or s >= fill - recent]
    return forced, list(range(sink, fill - recent))


def ranked(slots: list[int], scores: Row) -> list[int]:
    """Slots by falling score; of equal ones the lower slot first (`sorted` is stable)."""
    return sorted(sorted(slots), key=lambda s: -scores[s])


def max_pool(values: Row, window: int) -> Row:
    """Largest value within (window - 1) / 2 places of each; the window is cut at the edges."""
    return [max(values[max(0, i - window // 2) : i + window // 2 + 1]) for i in range(len(values))]


def gap(values: Row, cut: int, *, plateaus: bool = False) -> float:
    """Relative gap between the cut-th and the next of the values in falling order.

    Pooling makes plateaus, neighbours with the very same value, which any implementation splits
    alike (lower slot first). If `plateaus` and the cut falls into one, the gap is that from the
    plateau to the nearest other value.
    """
    falling = sorted(values, reverse=True)
    if not 0 < cut < len(falling):
        return math.inf
    last, others = falling[cut - 1], [falling[cut]]
    if plateaus and others == [last]:
        others = [value for value in falling if value != last]
    gaps = (abs(last - v) / max(abs(last), abs(v)) if last != v else 0.0 for v in others)
    return min(gaps, default=math.inf)


def choose_infinipot(
    mass: Row, novelty: Row, *, keep: int, sink: int, recent: int, alpha: float, pool: int
) -> Choice:
    """InfiniPot: forced slots, then the most novel, then the best pooled mass of the rest."""
    forced, free = split(len(mass), sink=sink, recent=recent)
    room, n_novel = keep - len(forced), math.floor(alpha * keep + 0.5)
    by_novelty = ranked(free, novelty)
    novel, others = by_novelty[:n_novel], by_novelty[n_novel:]
    pooled = max_pool(mass, pool)
    kept = (forced + novel + ranked(others, pooled))[:keep]
    novel_gap = gap([novelty[s] for s in free], min(n_novel, room))
    mass_gap = gap([pooled[s] for s in others], room - len(novel), plateaus=True)
    return Choice(sorted(kept), min(novel_gap, mass_gap))


def choose_best(scores: Row, *, keep: int, sink: int, recent: int) -> Choice:
    """Forced slots, then the highest scores."""
    forced, free = split(len(scores), sink=sink, recent=recent)
    kept = (forced + ranked(free, scores))[:keep]
    return Choice(sorted(kept), gap([scores[s] for s in free], keep - len(forced)))


def choose_streaming(fill: int, *, keep: int, sink: int, recent: int) -> Choice:
    """Forced slots, then the most recent: no score is computed, so nothing can nearly tie."""
    forced, free = split(fill, sink=sink, recent=recent)
    return Choice(sorted((forced + free[::-1])[:keep]), math.inf)


def keydiff_scores(keys: Tensor) -> Tensor:
    """-cos(key, mean of the normalised keys). keys [Hkv, fill, D] rotated -> [Hkv, fill]."""
    mean = functional.normalize(keys, dim=-1).mean(dim=1, keepdim=True)  # [Hkv, 1, D]
    return -functional.cosine_similarity(keys, mean, dim=-1)


class Entries(NamedTuple):
    """Entries of one layer. keys (un-rotated), values [Hkv, n, D]; novelty, positions [Hkv, n].

    `positions` is 0, 1, 2, … in every head, unless a broken variant says otherwise.
    """

    keys: Tensor
    values: Tensor
    novelty: Tensor
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
        policy: one of POLICIES. alpha, pool: InfiniPot's share of novelty and odd pooling window.
        catalyst: token ids that score the pot; needed by infinipot. May be changed at any time.
        dtype: of all arithmetic.
    Attributes:
        kept: one [L, Hkv, keep] int64 a compression: the slots kept, by their index before it.
        margins: one [L, Hkv] float64 a compression: Choice.margin of each head.
    Deliberately broken variants, to show that a parity test can fail:
        no_reset: kept entries stay at their old positions; new ones still start at fill.
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
    alpha: float = 0.5
    pool: int = 13
    catalyst: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    no_reset: bool = False
    mask_off_by_one: bool = False
    swap_keys_values: bool = False
    novelty_left_behind: bool = False
    shared_heads: bool = False

    def __post_init__(self) -> None:
        """Check the numbers, take the weights, make an empty pot."""
        if self.policy not in POLICIES or self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"want a policy of {POLICIES} and a positive odd pool")
        highest = min(self.keep_max, self.slots - self.chunk)
        if not self.sink + self.recent <= self.keep <= highest:
            raise ValueError("want sink + recent <= keep <= keep_max, and keep + chunk <= slots")
        self._load(self.model)
        self.kept: list[Tensor] = []
        self.margins: list[Tensor] = []
        self._next_logits: Tensor | None = None  # [V], after the last token read

    def _load(self, model: nn.Module) -> None:
        """Take weights and geometry from the model, and make an empty pot."""
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
        self._rope = inverse_frequencies(model, self._head_size)
        rows = torch.zeros(self._kv_heads, 0, self._head_size, dtype=self.dtype)
        empty = Entries(rows, rows, rows[..., 0], rows[..., 0].long())
        self._pot = [empty] * self._layers

    @property
    def fill(self) -> int:
        """Entries in the pot, the same in every layer and head."""
        return self._pot[0].keys.shape[1]

    @property
    def novelty(self) -> list[Tensor]:
        """For each layer [Hkv, fill], nats: the surprise of each entry's token when it was read."""
        return [pot.novelty for pot in self._pot]

    def keys(self, layer: int) -> Tensor:
        """[Hkv, fill, D], rotated at their present positions."""
        return rotate(self._pot[layer].keys, self._pot[layer].positions, *self._rope)

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
        if self.fill + len(tokens) > self.slots:
            self.compress(int(min(self.keep_max, max(self.keep, self.slots - remaining))))
        hidden, news, _ = self._run(tokens)
        logits = self._logits(hidden)  # [n, V]
        novelty = self._surprises(tokens, logits).expand(self._kv_heads, -1)
        self._pot = [
            pot.followed_by(Entries(new.keys, new.values, novelty, new.positions))
            for pot, new in zip(self._pot, news, strict=True)
        ]
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
        """Keep `keep` entries a layer and head, in their order; entry j then has position j."""
        if not self.sink + self.recent <= keep <= self.fill:
            raise ValueError(f"cannot keep {keep} of {self.fill} entries")
        masses = self.mass() if self.policy == "infinipot" else [None] * self._layers
        choices = [self._choose(layer, mass, keep) for layer, mass in enumerate(masses)]
        kept = torch.tensor([[head.kept for head in layer] for layer in choices])
        margins = [[head.margin for head in layer] for layer in choices]
        self._pot = [self._gather(pot, idx) for pot, idx in zip(self._pot, kept, strict=True)]
        self.kept.append(kept)
        self.margins.append(torch.tensor(margins, dtype=torch.float64))

    def mass(self) -> list[Tensor]:
        """Attention of the catalyst to each entry: L of [Hkv, fill].

        Summed over the catalyst's tokens, averaged over the query heads of a group. The catalyst
        stands at fill, fill + 1, …, sees the pot and causally itself, and is not stored.
        """
        if not self.catalyst:
            raise ValueError("the policy needs a catalyst, and there is none")
        _, _, probabilities = self._run(list(self.catalyst))  # L of [Hkv, G, n, m]
        return [p[..., : self.fill].sum(dim=2).mean(dim=1) for p in probabilities]

    def _choose(self, layer: int, mass: Tensor | None, keep: int) -> list[Choice]:
        """What each head of a layer keeps: Hkv choices. mass [Hkv, fill]."""
        forced = {"keep": keep, "sink": self.sink, "recent": self.recent}
        if self.policy == "streaming":
            choices = [choose_streaming(self.fill, **forced)] * self._kv_heads
        elif self.policy == "keydiff":
            scores: list[list[float]] = keydiff_scores(self.keys(layer)).tolist()
            choices = [choose_best(head, **forced) for head in scores]
        else:
            assert mass is not None
            choices = [
                choose_infinipot(m, n, alpha=self.alpha, pool=self.pool, **forced)
                for m, n in zip(mass.tolist(), self.novelty[layer].tolist(), strict=True)
            ]
        return choices[:1] * self._kv_heads if self.shared_heads else choices

    def _gather(self, pot: Entries, idx: Tensor) -> Entries:
        """The entries idx [Hkv, keep] of one layer, at positions 0, 1, 2, …"""
        heads, keep = idx.shape
        rows = idx[..., None].expand(-1, -1, self._head_size)
        keys, values = pot.keys.gather(1, rows), pot.values.gather(1, rows)
        novelty, positions = pot.novelty.gather(1, idx), torch.arange(keep).expand(heads, -1)
        if self.swap_keys_values:
            keys, values = values, keys
        if self.novelty_left_behind:
            novelty = pot.novelty[:, :keep]
        if self.no_reset:
            positions = pot.positions.gather(1, idx)
        return Entries(keys, values, novelty, positions)

    def _run(self, tokens: list[int]) -> tuple[Tensor, list[Entries], list[Tensor]]:
        """Run tokens over the pot, storing nothing; token i stands at position fill + i.

        Returns: the last layer's output [n, E]; the tokens' entries, one a layer, novelty 0; the
        attention probabilities, one [Hkv, G, n, m] a layer.
        """
        places = torch.arange(self.fill, self.fill + len(tokens))  # [n]
        x = self._weights["model.embed_tokens.weight"][torch.tensor(tokens)]  # [n, E]
        news, probabilities = [], []
        for layer in range(self._layers):
            name = f"model.layers.{layer}"
            normed = self._norm(f"{name}.input_layernorm", x)
            query, new = self._project(f"{name}.self_attn", normed, places)
            visible = self._pot[layer].followed_by(new)
            probability = self._attend(query, visible, places)
            mixed = probability @ visible.values[:, None]  # [Hkv, G, n, D]
            mixed = mixed.flatten(0, 1).transpose(0, 1).flatten(1)  # [n, Hq * D]
            x = x + self._linear(f"{name}.self_attn.o_proj", mixed)
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x))
            news.append(new)
            probabilities.append(probability)
        return x, news, probabilities

    def _project(self, name: str, x: Tensor, places: Tensor) -> tuple[Tensor, Entries]:
        """x [n, E] -> query [Hkv, G, n, D] un-rotated, and the tokens' entries."""
        heads = (len(places), -1, self._head_size)
        query, key, value = (self._linear(f"{name}.{p}_proj", x).view(heads) for p in "qkv")
        if f"{name}.q_norm.weight" in self._weights:  # Qwen3
            query, key = self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key)
        query = query.transpose(0, 1).reshape(self._kv_heads, self._groups, *heads[::2])
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        positions = places.expand(self._kv_heads, -1)
        return query, Entries(key, value, torch.zeros_like(key[..., 0]), positions)

    def _attend(self, query: Tensor, visible: Entries, places: Tensor) -> Tensor:
        """query [Hkv, G, n, D] at places [n] -> probabilities over pot and chunk [Hkv, G, n, m]."""
        query = rotate(query, places, *self._rope)
        key = rotate(visible.keys, visible.positions, *self._rope)[:, None]  # [Hkv, 1, m, D]
        scores = query @ key.transpose(-1, -2) / math.sqrt(self._head_size)
        last_seen = places[:, None] + int(self.mask_off_by_one)  # [n, 1]
        hidden = torch.arange(key.shape[2]) > last_seen  # [n, m]: later in the list
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
