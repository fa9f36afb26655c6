"""What each policy keeps, in plain words: the papers' formulas, over the entries of one layer.

It shares no code with the product. A rule looks at what is known of the entries (`Seen`) and
answers with tiers: the best of the first stay, then the best of the second, and so on. What stays
in any case, ties, and how many there are is the same for all rules (`choose`).

Letters: Hkv key/value heads, G query heads of each, D head size, n entries of the layer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Row = list[float]  # one number for each entry of one head


@dataclass(frozen=True)
class Choice:
    """What one head keeps: slots in ascending order, and how near the choice was to a tie.

    `margin` is the smallest relative gap, |a - b| / max(|a|, |b|), between the last kept and the
    first dropped of a tier. It is infinite where no two scores were compared.
    """

    kept: list[int]
    margin: float


class Tier(NamedTuple):
    """The best `most` by `scores` [Hkv, n] stay. pooled: neighbours may have the same score."""

    scores: Tensor
    most: int
    pooled: bool = False


class Seen(NamedTuple):
    """What is known of one layer's entries when they are compressed.

    keys, turned, values: [Hkv, n, D], keys before rotation and where they stand.
    novelty, received: [Hkv, n], nats; attention of all tokens since, themselves included.
    rows: attention of each token read since the last compression, the newest last, as it was when
        it was first read: [Hkv, G, fewer than n or n].
    mass: [Hkv, n], of the catalyst; 0 without one. position: of the next token.
    statistics: mean [Hq, D], covariance [Hq, D, D] of queries before rotation.
    turn: x [..., m, D], positions [..., m] -> rotated.
    """

    layer: int
    sink: int
    recent: int
    keys: Tensor
    turned: Tensor
    values: Tensor
    novelty: Tensor
    received: Tensor
    rows: list[Tensor]
    mass: Tensor
    position: int
    statistics: tuple[Tensor, Tensor] | None
    turn: Callable[[Tensor, Tensor], Tensor]

    @property
    def fill(self) -> int:
        return self.keys.shape[1]

    def last(self, count: int) -> Tier:
        """The newest `count` entries; some of them stay in any case."""
        there = torch.arange(self.fill) >= self.fill - count
        return Tier(there.to(self.keys).expand(self.keys.shape[:2]), max(0, count - self.recent))

    def window(self, count: int) -> Tensor:
        """Mean attention [Hkv, n] of the newest tokens, and of a group, to what was before them.

        What the product reads again. The two are the same while all of the window was read since
        the last compression; the product's older tokens see the pot that is left.
        """
        if count > len(self.rows):
            raise ValueError(f"{len(self.rows)} tokens were read since; the window is {count}")
        before = self.fill - count
        seen = torch.stack([row[..., :before] for row in self.rows[-count:]])
        return functional.pad(seen.mean(dim=(0, 2)), (0, count))


def split(fill: int, *, sink: int, recent: int) -> tuple[list[int], list[int]]:
    """The slots kept whatever their score, the first `sink` and last `recent`; and the others."""
    forced = [s for s in range(fill) if s < sink or s >= fill - recent]
    return forced, list(range(sink, fill - recent))


def ranked(slots: list[int], scores: Row) -> list[int]:
    """Slots by falling score; of equal ones the lower slot first (`sorted` is stable)."""
    return sorted(sorted(slots), key=lambda s: -scores[s])


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


def choose(tiers: Sequence[tuple[Row, int, bool]], *, keep: int, sink: int, recent: int) -> Choice:
    """What one head keeps: forced slots, then the best of each tier (scores, most, pooled)."""
    kept, free = split(len(tiers[0][0]), sink=sink, recent=recent)
    margin = math.inf
    for scores, most, pooled in tiers:
        room = min(most, keep - len(kept))
        margin = min(margin, gap([scores[s] for s in free], room, plateaus=pooled))
        best = ranked(free, scores)[:room]
        kept, free = kept + best, [s for s in free if s not in best]
    return Choice(sorted(kept[:keep]), margin)


def _neighbours(scores: Tensor, pool: int) -> list[Tensor]:
    """Of each slot, [Hkv, up to pool]: it and those within (pool - 1) / 2; fewer at the ends."""
    half, count = pool // 2, scores.shape[1]
    return [scores[:, max(0, s - half) : s + half + 1] for s in range(count)]


def max_pool(scores: Tensor, pool: int) -> Tensor:
    """The largest of its neighbours, [Hkv, n]."""
    return torch.stack([near.amax(dim=1) for near in _neighbours(scores, pool)], dim=1)


def mean_pool(scores: Tensor, pool: int) -> Tensor:
    """The mean of its neighbours, [Hkv, n]."""
    return torch.stack([near.mean(dim=1) for near in _neighbours(scores, pool)], dim=1)


def stepped(scores: Tensor) -> Tensor:
    """To 1/1024: what is equal but for the last bits ties, and the lower slot stays."""
    return (scores * 1024).round() / 1024


def streaming(seen: Seen, keep: int) -> list[Tier]:
    """StreamingLLM, 2309.17453: the sinks, which are forced, and the newest."""
    return [Tier(torch.arange(seen.fill).to(seen.keys).expand(seen.keys.shape[:2]), keep)]


def snapkv(seen: Seen, keep: int, *, window: int, pool: int) -> list[Tier]:
    """2404.14469: the window; then what it attends to, averaged over the group, mean-pooled.

    At the first slots the paper's code divides by `pool` all the same.
    """
    return [seen.last(window), Tier(mean_pool(seen.window(window), pool), keep)]


def h2o(seen: Seen, keep: int) -> list[Tier]:
    """2306.14048: half of the budget is the newest, the rest received most attention so far."""
    return [seen.last(keep // 2), Tier(seen.received, keep)]


def tova(seen: Seen, keep: int) -> list[Tier]:
    """2401.06104: what the newest token attends to, averaged over all heads of the layer."""
    mean = seen.window(1).mean(dim=0, keepdim=True)
    return [seen.last(1), Tier(mean.expand(seen.keys.shape[:2]), keep)]


def sirllm(seen: Seen, keep: int) -> list[Tier]:
    """2405.12528: -log p of the token when it was read."""
    return [Tier(seen.novelty, keep)]


def keydiff(seen: Seen, keep: int, *, rotated: bool, pool: int) -> list[Tier]:
    """2504.15364: -cos(key, mean of the keys' directions); here also before rotation, and pooled
    by the mean."""
    keys = seen.turned if rotated else seen.keys
    mean = functional.normalize(keys, dim=-1).mean(dim=1, keepdim=True)  # [Hkv, 1, D]
    scores = -functional.cosine_similarity(keys, mean, dim=-1)
    return [Tier(mean_pool(stepped(scores), pool), keep, pooled=True)]


def vatp(seen: Seen, keep: int, *, window: int) -> list[Tier]:
    """2406.12335: the window; then what it attends to, times the sum of |v|."""
    return [seen.last(window), Tier(seen.window(window) * seen.values.abs().sum(dim=-1), keep)]


def knorm(seen: Seen, keep: int) -> list[Tier]:
    """2406.11430: the keys of least norm."""
    return [Tier(-stepped(seen.keys.norm(dim=-1)), keep)]


def vnorm(seen: Seen, keep: int, *, pool: int) -> list[Tier]:
    """2506.15745, one of its two scores: the values of largest norm; here pooled by the mean."""
    return [Tier(mean_pool(stepped(seen.values.norm(dim=-1)), pool), keep, pooled=True)]


def expected_attention(seen: Seen, keep: int, *, future: int) -> list[Tier]:
    """2510.00636: a query is normal, with its mean m and covariance S turned by the mean rotation
    of the next `future` positions: E[exp(q k / sqrt D)] = exp(m k / sqrt D + k S k / 2D), as a
    share of all, averaged over the group, times |v|."""
    assert seen.statistics is not None
    heads, _, size = seen.keys.shape
    ahead = torch.arange(seen.position, seen.position + future)
    basis = torch.eye(size, dtype=torch.float64)[:, None].expand(-1, future, -1)
    turn = seen.turn(basis, ahead.expand(size, -1)).mean(dim=1).T  # [D, D]: turn @ q
    means, spreads = (each.double() for each in seen.statistics)
    shares = []
    for query_head, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        keys = seen.turned[query_head // (len(means) // heads)].double()  # [n, D]
        wide = turn @ spread @ turn.T
        exponent = keys @ (turn @ mean) / math.sqrt(size)
        exponent += torch.einsum("nd,de,ne->n", keys, wide, keys) / (2 * size)
        shares.append(exponent.softmax(dim=0))
    mean_share = torch.stack(shares).reshape(heads, -1, seen.fill).mean(dim=1)
    return [Tier(mean_share * seen.values.double().norm(dim=-1), keep)]


def random(seen: Seen, keep: int, *, seed: int) -> list[Tier]:
    """The finalizer of MurmurHash3 over seed, layer, head and slot."""
    heads = seen.keys.shape[0]

    def mixed(head: int, slot: int) -> int:
        word = (seed * 0x9E3779B1 + (seen.layer * heads + head) * 0x10001 + 1 + slot) % 2**32
        word = (word ^ word // 2**16) * 0x85EBCA6B % 2**32
        word = (word ^ word // 2**13) * 0xC2B2AE35 % 2**32
        return word ^ word // 2**16

    table = [[mixed(head, slot) for slot in range(seen.fill)] for head in range(heads)]
    return [Tier(torch.tensor(table, dtype=torch.float64), keep)]


def catalyst(seen: Seen, keep: int, *, pool: int) -> list[Tier]:
    """2410.01518, CaP: what the catalyst attends to; here max-pooled."""
    return [Tier(max_pool(seen.mass, pool), keep, pooled=True)]


def infinipot(seen: Seen, keep: int, *, alpha: float, pool: int) -> list[Tier]:
    """2410.01518: the most novel, a share alpha of all; then by the catalyst."""
    novel = Tier(seen.novelty, math.floor(alpha * keep + 0.5))
    return [novel, *catalyst(seen, keep, pool=pool)]


def blend(seen: Seen, keep: int, *, mix: str) -> list[Tier]:
    """The sum of weighted scores, each with mean 0 and deviation 1 over what may go; a term that
    tells nothing apart counts nothing. mix: with all settings, "2*keydiff(pool=1,rotated=false)".
    """
    free = slice(seen.sink, seen.fill - seen.recent)
    total = torch.zeros(seen.keys.shape[:2], dtype=torch.float64)
    for term in mix.replace(" ", "").split("+"):
        weight, _, rest = term.rpartition("*")
        name, _, listed = rest.rstrip(")").partition("(")
        settings = dict(pair.split("=") for pair in filter(None, listed.split(",")))
        rule = partial(RULES[name], **{key: json.loads(value) for key, value in settings.items()})
        scores = rule(seen, keep)[-1].scores.double()
        inside = scores[:, free]
        spread = inside.std(dim=1, keepdim=True, correction=0)
        if (spread > 0).all():
            total += float(weight or 1) * (scores - inside.mean(dim=1, keepdim=True)) / spread
    return [Tier(total, keep)]


RULES: dict[str, Callable[..., list[Tier]]] = {
    "streaming": streaming,
    "snapkv": snapkv,
    "h2o": h2o,
    "tova": tova,
    "sirllm": sirllm,
    "keydiff": keydiff,
    "vatp": vatp,
    "knorm": knorm,
    "vnorm": vnorm,
    "expected-attention": expected_attention,
    "random": random,
    "catalyst": catalyst,
    "infinipot": infinipot,
    "blend": blend,
}
