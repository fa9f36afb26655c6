"""The oracle against transformers' own forward pass; its rules are in test_reference_policies.

Where the loop leaves the plain model (after a compression) transformers is asked again: the pot's
keys and values are put into its cache, and its next logits must be the reference's.
"""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.reference import Reference

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 3, 6, 2, 10, 97
PROMPT = [(7 * i * i + 3 * i + 11) % VOCABULARY for i in range(43)]
CATALYST = [5, 90, 33, 61, 2]
THETA = 500.0
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def tiny(family: str = "Llama", **changes: Any) -> Any:
    """A random model whose attention is far from uniform; sizes are odd where they may be."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 54,  # not the heads' 60
        "intermediate_size": 77,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
    }
    if family == "Qwen2":  # has no head_dim of its own
        settings["hidden_size"] = HEADS * HEAD_SIZE
    config = getattr(transformers, f"{family}Config")(**(settings | changes))
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # these start as 0 and 1
            weight.data += 0.3 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module", name="model")
def model_fixture() -> Any:
    """The model of most tests."""
    return tiny()


def reference(model: Any, **changes: Any) -> Reference:
    """A pot of 20 slots, chunks of 7, half kept; `changes` override."""
    settings: dict[str, Any] = {
        "slots": 20,
        "chunk": 7,
        "keep": 10,
        "keep_max": 16,
        "sink": 2,
        "recent": 3,
        "policy": "infinipot",
        "catalyst": CATALYST,
    }
    own: dict[str, dict[str, Any]] = {
        "infinipot": {"alpha": 0.25, "pool": 3},  # 5 forced, 3 by novelty, 2 by mass
        "keydiff": {"rotated": True, "pool": 1},
    }
    settings |= changes
    return Reference(model, **{"settings": own.get(settings["policy"], {}), **settings})


@torch.no_grad()
def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """transformers, the whole text at once: [n, V]."""
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@torch.no_grad()
def logits_over_pot(model: Any, pot: Reference, ids: list[int]) -> Tensor:
    """transformers, with the pot as its cache: [n, V]."""
    cache = transformers.DynamicCache()
    for layer in range(LAYERS):
        cache.update(pot.keys(layer)[None].clone(), pot.values(layer)[None].clone(), layer)
    logits: Tensor = model(torch.tensor([ids]), past_key_values=cache).logits[0]
    return logits


def turn(keys: Tensor, steps: Tensor) -> Tensor:
    """Turn rotated keys [Hkv, n, D] by steps [Hkv, n] positions, in complex numbers."""
    half = HEAD_SIZE // 2
    speed = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    pairs = torch.complex(keys[..., :half].double(), keys[..., half:].double())
    turned = pairs * torch.exp(1j * steps[..., None] * speed)
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def close(actual: Tensor, expected: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


# The plain model


@pytest.mark.parametrize("chunk", [1, 5, 7, 60])
def test_a_context_that_fits_gives_the_plain_models_logits(model: Any, chunk: int) -> None:
    pot = reference(model, slots=120, chunk=chunk)
    expected = plain_logits(model, PROMPT)
    close(pot.read(PROMPT[:30]), expected[29])
    close(pot.decode(PROMPT[30]), expected[30])
    close(pot.read(PROMPT[31:]), expected[42])
    assert pot.fill == len(PROMPT)
    assert not pot.kept


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Qwen2", {}),
        ("Qwen3", {}),
    ],
)
def test_relatives_give_the_plain_models_logits(family: str, changes: dict[str, Any]) -> None:
    model = tiny(family, **changes)
    pot = reference(model, slots=120)
    close(pot.read(PROMPT), plain_logits(model, PROMPT)[-1])


def test_the_tiny_models_attention_is_not_uniform(model: Any) -> None:
    pot = reference(model, slots=120)
    pot.read(PROMPT)
    share = torch.stack(pot.mass()) / len(CATALYST)  # [L, Hkv, fill], a uniform one were 1/fill
    assert (share.max(dim=-1).values > 3 / len(PROMPT)).all()


def test_an_unknown_family_is_refused(model: Any) -> None:
    model.config.model_type = "gemma"
    try:
        with pytest.raises(ValueError, match="gemma"):
            reference(model)
    finally:
        model.config.model_type = "llama"


# What is stored


def test_novelty_is_the_plain_models_surprise(model: Any) -> None:
    pot = reference(model, slots=120)
    pot.read(PROMPT[:30])
    for token in PROMPT[30:]:
        pot.decode(token)
    log_p = plain_logits(model, PROMPT).log_softmax(dim=-1)
    expected = [0.0] + [-log_p[t - 1, PROMPT[t]].item() for t in range(1, len(PROMPT))]
    for novelty in pot.novelty:
        close(novelty, torch.tensor(expected).expand(KV_HEADS, -1))


def test_novelty_across_a_compression_is_what_was_expected_before_it(model: Any) -> None:
    pot = reference(model, slots=20, chunk=7, keep=10)
    expected = plain_logits(model, PROMPT[:19]).log_softmax(dim=-1)
    pot.read(PROMPT[:19])
    pot.compress(10)
    pot.decode(PROMPT[19])
    close(pot.novelty[0][:, -1], -expected[18, PROMPT[19]].expand(KV_HEADS))


def test_mass_is_the_plain_models_attention(model: Any) -> None:
    pot = reference(model, slots=120)
    pot.read(PROMPT)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([PROMPT + CATALYST]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    fill = len(PROMPT)
    for mass, attention in zip(pot.mass(), output.attentions, strict=True):
        seen = attention[0, :, fill:, :fill].sum(dim=1)  # [Hq, fill]
        close(mass, torch.stack((seen[:3].mean(dim=0), seen[3:].mean(dim=0))))
    assert pot.fill == fill


# Compression


@pytest.mark.parametrize("policy", ["infinipot", "streaming", "keydiff"])
def test_a_compression_gathers_and_resets(model: Any, policy: str) -> None:
    pot = reference(model, policy=policy)
    pot.read(PROMPT[:17])
    keys = [pot.keys(layer) for layer in range(LAYERS)]
    values = [pot.values(layer) for layer in range(LAYERS)]
    novelty = pot.novelty
    pot.compress(10)
    (kept,) = map(torch.stack, pot.kept)
    assert kept.shape == (LAYERS, KV_HEADS, 10)
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[..., :2] == torch.tensor([0, 1])).all()
    assert (kept[..., -3:] == torch.tensor([14, 15, 16])).all()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            idx = kept[layer, head]
            turned = turn(keys[layer][head, idx], torch.arange(10) - idx)
            close(pot.keys(layer)[head], turned, atol=1e-5)
            assert pot.values(layer)[head].equal(values[layer][head, idx])
            assert pot.novelty[layer][head].equal(novelty[layer][head, idx])


def test_heads_and_layers_choose_for_themselves(model: Any) -> None:
    pot = reference(model)
    pot.read(PROMPT)
    assert len({tuple(head) for layer in pot.kept[0] for head in layer.tolist()}) > 3
    assert not pot.novelty[0][0].equal(pot.novelty[1][1])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # its new name is newer
@pytest.mark.parametrize("policy", ["infinipot", "streaming", "keydiff"])
def test_after_compressions_the_pot_is_a_plain_cache(model: Any, policy: str) -> None:
    pot = reference(model, policy=policy)
    pot.read(PROMPT)
    assert len(pot.kept) == 4
    assert pot.fill == 18
    following = [4, 77]
    expected = logits_over_pot(model, pot, following)
    for token, logits in zip(following, expected, strict=True):
        close(pot.decode(token), logits)


def test_double_precision_agrees(model: Any) -> None:
    single, double = reference(model), reference(model, dtype=torch.float64)
    a, b = single.read(PROMPT), double.read(PROMPT)
    assert b.dtype == torch.float64
    assert min(margin.min().item() for margin in double.margins) > 1e-5  # so the choices must agree
    assert all(same(*pair) for pair in zip(single.kept, double.kept, strict=True))
    close(a.double(), b)


# When, and how much


def test_the_loop_compresses_when_the_next_tokens_would_not_fit(model: Any) -> None:
    pot = reference(model, policy="streaming")
    fills = []
    for _ in range(25):
        pot.decode(1)
        fills.append(pot.fill)
    assert fills == [*range(1, 21), *range(11, 16)]
    pot = reference(model, policy="streaming")
    pot.read(PROMPT[:21])  # chunks of 7, 7, 6: exactly full; then the last token needs room
    assert [kept[0].shape[-1] for kept in pot.kept] == [10]
    assert pot.fill == 11


@pytest.mark.parametrize(
    ("length", "to_come", "keeps"),
    [
        (43, None, [10, 10, 10, 10]),  # chunks 3, 4, 5, 6 of 7 find no room; the last token does
        (43, 0, [10, 10, 10, 12]),  # at chunk 6 there are 7 + 1 to read, and 20 - 8 may stay
        (43, 1, [10, 10, 10, 11]),
        (43, 9, [10, 10, 10, 10]),
        (20, 0, []),  # 7 + 7 + 5 + 1: just full
        (21, 0, [16]),  # only the last token finds no room: 19 might stay, but for keep_max
        (22, 0, [12]),
    ],
)
def test_what_is_still_to_come_decides_how_much_is_kept(
    model: Any, length: int, to_come: int | None, keeps: list[int]
) -> None:
    pot = reference(model, policy="streaming")
    pot.read(PROMPT[:length], to_come)
    assert [kept[0].shape[-1] for kept in pot.kept] == keeps


def test_bad_settings_are_refused(model: Any) -> None:
    for changes in ({"keep": 14}, {"keep": 4}, {"keep_max": 9}, {"policy": "best"}):
        with pytest.raises(ValueError, match="want"):
            reference(model, **changes)
    pot = reference(model, catalyst=None)
    with pytest.raises(ValueError, match="catalyst"):
        pot.read(PROMPT)


def test_queries_that_do_not_vary_are_attended_as_they_are(model: Any) -> None:
    """With a covariance of 0 and one position ahead, expected attention is attention."""
    pot = reference(model, policy="expected-attention", settings={"future": 1}, slots=120)
    pot.read(PROMPT)
    mean = torch.randn(LAYERS, HEADS, HEAD_SIZE)
    pot.statistics = (mean, torch.zeros(LAYERS, HEADS, HEAD_SIZE, HEAD_SIZE))
    turned = turn(mean[1], torch.full((HEADS, 1), pot.position)[:, 0])
    weights = [
        (pot.keys(1)[head // 3] @ turned[head] / HEAD_SIZE**0.5).softmax(dim=0)
        for head in range(HEADS)
    ]
    share = torch.stack(weights).reshape(KV_HEADS, 3, -1).mean(dim=1)
    scores = share * pot.values(1).norm(dim=-1)
    forced = {0, 1, 40, 41, 42}
    for head in range(KV_HEADS):
        best = [s for s in scores[head].argsort(descending=True).tolist() if s not in forced]
        kept = sorted(forced | set(best[:5]))
        assert [c.kept for c in pot._choose(1, torch.zeros(1), 10)][head] == kept


# Positions


def test_positions_begin_anew_only_where_they_run_out(model: Any) -> None:
    """Of 60 positions, chunks and catalyst of 7: the first compressions leave all in place."""
    pot = reference(model, policy="keydiff", positions=60, widest=7)
    plain = reference(model, policy="keydiff")
    pot.read(PROMPT + PROMPT)
    plain.read(PROMPT + PROMPT)
    assert plain.resets == [True] * len(plain.resets)
    assert pot.resets[:3] == [False] * 3
    assert True in pot.resets
    assert pot.position > plain.position == plain.fill


def test_kept_entries_stay_where_they_were(model: Any) -> None:
    pot = reference(model, policy="keydiff", positions=1000)
    pot.read(PROMPT[:17])
    before = pot.keys(1)
    pot.compress(10)
    rows = pot.kept[0][1][..., None].expand(-1, -1, HEAD_SIZE)
    assert pot.keys(1).equal(before.gather(1, rows))
    assert pot.position == 17


def test_layers_of_different_sizes_keep_their_share(model: Any) -> None:
    pot = reference(model, layer_slots=(23, 20, 17), policy="streaming")
    pot.read(PROMPT)
    # At first the smallest is full while the largest still has room.
    assert [[each.shape[-1] for each in kept] for kept in pot.kept[:2]] == [[13, 10, 7]] * 2
    assert pot.fills == [21, 18, 15]
    few = reference(model, layer_slots=(28, 20, 12), keep=13, policy="streaming")
    few.read(PROMPT[:13])
    assert [each.shape[-1] for each in few.kept[0]] == [12, 12, 5]


def test_attention_received_is_the_plain_models(model: Any) -> None:
    pot = reference(model, slots=120)
    pot.read(PROMPT)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([PROMPT]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    for layer, attention in enumerate(output.attentions):
        whole = attention[0].reshape(KV_HEADS, 3, len(PROMPT), len(PROMPT)).mean(dim=1)
        close(pot._pot[layer].received, whole.sum(dim=1))
        rows = torch.stack([row[..., -1].mean(dim=1) for row in pot._rows[layer][-1:]])
        close(rows[0], whole[:, -1, -1])


# The broken variants


@pytest.mark.parametrize(
    "fault", ["no_reset", "mask_off_by_one", "swap_keys_values", "shared_heads"]
)
def test_a_broken_variant_gives_other_logits(model: Any, fault: str) -> None:
    right, wrong = reference(model), reference(model, **{fault: True})
    difference = right.read(PROMPT) - wrong.read(PROMPT)
    assert difference.abs().max() > 0.1


def test_novelty_left_behind_chooses_otherwise(model: Any) -> None:
    right = reference(model, policy="sirllm")
    wrong = reference(model, policy="sirllm", novelty_left_behind=True)
    right.read(PROMPT)
    wrong.read(PROMPT)
    assert same(right.kept[0], wrong.kept[0])
    assert not same(right.kept[1], wrong.kept[1])


def test_without_reset_old_entries_stay_where_they_were(model: Any) -> None:
    pot = reference(model, no_reset=True, policy="streaming")
    pot.read(PROMPT[:17])
    before = pot.keys(1)
    pot.compress(10)
    assert pot.keys(1).equal(before.gather(1, pot.kept[0][1][..., None].expand(-1, -1, HEAD_SIZE)))
    assert pot.position == 10


def test_positions_left_behind_give_other_logits(model: Any) -> None:
    """But only where nothing moves to the front."""
    for positions, apart in ((None, False), (1000, True)):
        right = reference(model, positions=positions)
        wrong = reference(model, positions=positions, positions_left_behind=True)
        difference = right.read(PROMPT) - wrong.read(PROMPT)
        assert (float(difference.abs().max()) > 0.1) is apart
