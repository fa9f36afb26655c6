"""The oracle of all families against transformers' own forward pass, and against `Reference`.

Differences are relative to the largest logit.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests import tiny
from tests.reference import Reference
from tests.reference_families import TABLE, FamilyReference, Turning, windows_of

PROMPT = [(7 * i * i + 3 * i + 11) % 280 for i in range(43)]  # three windows and more
LONG = [(5 * i * i + 13 * i + 7) % 280 for i in range(200)]
CATALYST = [5, 90, 33, 61, 2]
CLOSE, APART = 1e-5, 1e-3
LLAMAS = [name for name in tiny.FAMILIES if name.startswith(("llama", "mistral", "qwen"))]
LLAMAS = [name for name in LLAMAS if name not in ("qwen2-windows", "qwen3-moe")]
WINDOWED = {
    "gpt-oss": [1],
    "ministral": [1],
    "qwen2-windows": [0],
    "olmo3": [2],
    "gemma2": [1],
    "gemma3": [2],
    "cohere2": [1],
    "exaone4": [2],
}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@cache
def model(family: str) -> Any:
    """A tiny model whose attention is the plainest that transformers has."""
    made = tiny.model(family)
    made.config._attn_implementation = "eager"
    return made


def reference(family: str | Any, kind: Any = FamilyReference, **changes: Any) -> Any:
    """A pot of 20 slots, chunks of 7, half kept; `changes` override."""
    settings: dict[str, Any] = {
        "slots": 20,
        "chunk": 7,
        "keep": 10,
        "keep_max": 13,
        "sink": 2,
        "recent": 3,
        "policy": "infinipot",
        "settings": {"alpha": 0.25, "pool": 3},
        "catalyst": CATALYST,
        **changes,
    }
    return kind(model(family) if isinstance(family, str) else family, **settings)


def roomy(family: str | Any, **changes: Any) -> Any:
    """A pot in which every text of this file fits."""
    return reference(family, slots=300, **changes)


@torch.no_grad()
def plain_logits(made: Any, ids: list[int]) -> Tensor:
    """transformers, the whole text at once: [n, V]."""
    logits: Tensor = made(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def difference(mine: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest number."""
    assert mine.shape == wanted.shape
    return float((mine - wanted).abs().max() / wanted.abs().max())


# The plain model


@every_family
def test_a_context_that_fits_gives_the_plain_models_logits(family: str) -> None:
    wanted = plain_logits(model(family), PROMPT)
    assert wanted.isfinite().all()
    pot = roomy(family)
    assert difference(pot.read(PROMPT[:30]), wanted[29]) < CLOSE
    assert difference(pot.decode(PROMPT[30]), wanted[30]) < CLOSE
    assert difference(pot.read(PROMPT[31:]), wanted[42]) < CLOSE
    assert pot.chosen == WINDOWED.get(family, [0, 1, 2])
    assert pot.fills == [len(PROMPT)] * len(pot.chosen)
    assert not pot.kept


@every_family
def test_a_saved_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    model(family).save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again.config._attn_implementation = "eager"
    assert plain_logits(again, PROMPT).equal(plain_logits(model(family), PROMPT))


@every_family
def test_no_tiny_models_attention_is_uniform(family: str) -> None:
    pot = roomy(family, positions=tiny.WINDOW)  # so that no layer has a window
    pot.read(PROMPT)
    for layer in range(3):
        largest = pot._shares[layer].max(dim=-1).values.mean()  # of the last token, in each head
        assert largest > 1.5 / len(PROMPT)  # measured: qwen2 1.9, llama 2.6, most above 3


@pytest.mark.parametrize("family", ["llama", "falcon", "mixtral", "phi4-mini"])
def test_the_model_stays_as_it_was(family: str) -> None:
    before = plain_logits(model(family), PROMPT)
    roomy(family, dtype=torch.float64).read(PROMPT)
    assert model(family).config._attn_implementation == "eager"
    assert plain_logits(model(family), PROMPT).equal(before)


def test_double_precision_agrees() -> None:
    for family in ("glm", "gemma2", "falcon-gqa"):
        logits = roomy(family, dtype=torch.float64).read(PROMPT)
        assert difference(logits, roomy(family).read(PROMPT)) < CLOSE


def test_what_the_table_does_not_have_is_refused() -> None:
    made: Any = tiny.model("llama")
    made.config.model_type = "hunyuan_v1_dense"  # norms keys after turning them
    with pytest.raises(ValueError, match="hunyuan"):
        reference(made)
    with pytest.raises(ValueError, match="falcon"):
        reference(tiny.model("falcon", alibi=True))


def test_the_soft_cap_matters() -> None:
    uncapped = tiny.model("gemma2", attn_logit_softcapping=None)
    wanted = plain_logits(model("gemma2"), PROMPT)
    assert difference(plain_logits(uncapped, PROMPT), wanted) > APART
    assert difference(roomy(uncapped).read(PROMPT), wanted[-1]) > APART


# What tells families apart


@pytest.mark.parametrize(
    ("families", "wrong"),
    [
        ("cohere helium ernie4_5", Turning("half")),
        ("glm glm4", Turning("half", partial=True)),
        ("glm glm4", Turning("interleaved")),
        ("phi stablelm gpt-neox nemotron", Turning()),
        ("phi4-mini", Turning("interleaved", partial=True)),
        ("llama gemma falcon", Turning("interleaved")),
        ("smollm3 exaone4", Turning()),
        ("smollm3", Turning(still="global")),
        ("cohere2", Turning("interleaved")),
        ("cohere2", Turning("half", still="global")),
        ("gemma3", Turning("interleaved", by_type=True)),
    ],
)
def test_a_wrong_way_to_turn_gives_other_logits(families: str, wrong: Turning) -> None:
    for family in families.split():
        logits = roomy(family, turning=wrong).read(PROMPT)
        assert difference(logits, plain_logits(model(family), PROMPT)[-1]) > APART, family


def test_each_type_of_layer_has_its_own_frequencies() -> None:
    pot = roomy("gemma3")
    (local, _), (also_local, _), (whole, _) = pot._ropes
    assert local.equal(also_local)
    powers = -torch.arange(5, dtype=torch.float64) / 5
    torch.testing.assert_close(local, 700.0**powers, atol=0, rtol=1e-6)
    torch.testing.assert_close(whole, 20000.0**powers / 4, atol=0, rtol=1e-6)  # scaled by 4


# Order of the elements of a key

EVENS_ODDS = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
SIX_OF_TWELVE = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
SIX_INTERLEAVED = [0, 2, 4, 6, 7, 8, 1, 3, 5, 9, 10, 11]
FOUR_OF_TWELVE = [0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11]
EIGHT_OF_TWELVE = [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11]
ORDERS = {
    "llama": list(range(10)),
    "cohere": EVENS_ODDS,
    "helium": EVENS_ODDS,
    "glm": SIX_INTERLEAVED,
    "glm4": SIX_INTERLEAVED,
    "phi": SIX_OF_TWELVE,
    "nemotron": SIX_OF_TWELVE,
    "gpt-neox": FOUR_OF_TWELVE,
    "stablelm": FOUR_OF_TWELVE,
    "phi4-mini": EIGHT_OF_TWELVE,
    "falcon": list(range(10)),
    "falcon-gqa": list(range(10)),
}


def copies(family: str) -> int:
    """How often transformers' cache has each key/value head."""
    return 3 if family == "falcon-gqa" else 1


@pytest.mark.parametrize("family", ORDERS)
def test_keys_are_transformers_own_in_the_pots_order(family: str) -> None:
    filled: Any = DynamicCache()
    with torch.no_grad():
        model(family)(torch.tensor([PROMPT]), cache=filled)
    pot = roomy(family)
    pot.read(PROMPT)
    for number, layer in enumerate(filled.layers):
        keys, values = layer.keys[0, :: copies(family)], layer.values[0, :: copies(family)]
        assert difference(pot.keys(number), keys[..., ORDERS[family]]) < CLOSE
        assert difference(pot.values(number), values) < CLOSE


@pytest.mark.parametrize("family", ORDERS)
def test_after_compressions_the_pot_is_a_plain_cache(family: str) -> None:
    pot = reference(family)
    pot.read(PROMPT)
    assert len(pot.kept) >= 3
    filled = DynamicCache()
    back = torch.tensor(ORDERS[family]).argsort()
    for layer in range(3):
        keys, values = pot.keys(layer)[..., back], pot.values(layer)
        twins = (each.repeat_interleave(copies(family), dim=0)[None] for each in (keys, values))
        filled.update(*twins, layer)
    with torch.no_grad():
        wanted = model(family)(torch.tensor([[4]]), cache=filled).logits[0, 0]
    assert difference(pot.decode(4), wanted) < CLOSE


# The plain oracle

POLICIES: dict[str, dict[str, Any]] = {
    "infinipot": {"alpha": 0.25, "pool": 3},
    "h2o": {},
    "keydiff": {"rotated": True, "pool": 1},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", LLAMAS)
def test_llamas_are_those_of_the_plain_oracle(family: str, policy: str) -> None:
    settings = {"policy": policy, "settings": POLICIES[policy], "positions": 45, "widest": 7}
    one, other = reference(family, **settings), reference(family, Reference, **settings)
    assert difference(one.read(LONG), other.read(LONG)) < CLOSE
    assert one.resets == other.resets
    assert set(one.resets) == {True, False}
    assert len(one.kept) == len(other.kept) > 12
    for mine, wanted in zip(one.kept, other.kept, strict=True):
        assert torch.stack(mine).equal(torch.stack(wanted))
    assert one.position == other.position
    for layer in range(3):
        assert difference(one.keys(layer), other.keys(layer)) < CLOSE
        assert difference(one.values(layer), other.values(layer)) < CLOSE
        assert difference(one.novelty[layer], other.novelty[layer]) < CLOSE


# Windows


@pytest.mark.parametrize("family", WINDOWED)
def test_windowed_layers_see_what_transformers_shows_them(family: str) -> None:
    wanted = plain_logits(model(family), LONG[:80])[-1]
    assert difference(roomy(family).read(LONG[:80]), wanted) < CLOSE
    # A window that no text leaves is none.
    unhidden = roomy(family, positions=tiny.WINDOW)
    assert unhidden.chosen == [0, 1, 2]
    assert difference(unhidden.read(LONG[:80]), wanted) > APART


@pytest.mark.parametrize("family", WINDOWED)
def test_only_layers_without_a_window_are_compressed(family: str) -> None:
    pot = reference(family, policy="streaming", settings={}, positions=60, widest=7)
    pot.read(LONG)
    chosen = WINDOWED[family]
    assert set(pot.resets) == {True, False}
    assert all(len(kept) == len(chosen) for kept in pot.kept)
    assert all(margins.shape[0] == len(chosen) for margins in pot.margins)
    assert len(pot.mass()) == len(pot.novelty) == len(pot.fills) == len(chosen)
    assert pot.fill <= 20
    for layer in set(range(3)) - set(chosen):
        entries = pot._pot[layer]
        assert entries.keys.shape[1] == len(LONG)
        places = torch.arange(pot.position - len(LONG), pot.position)
        assert (entries.positions == places).all()
        keys, values = pot.tail(layer, 5)
        assert keys.equal(pot.keys(layer)[:, -5:])
        assert values.equal(pot.values(layer)[:, -5:])


@pytest.mark.parametrize("family", ["cohere2", "exaone4"])
def test_where_chosen_layers_do_not_turn_positions_do_not_matter(family: str) -> None:
    """They are compared with tokens in windowed layers only, and those all move alike."""
    logits = [reference(family, positions=p, widest=7).read(LONG) for p in (None, 60, 4000)]
    assert difference(logits[1], logits[0]) < CLOSE
    assert difference(logits[2], logits[0]) < CLOSE
    assert not reference(family, positions=4000).resets


def test_a_window_that_reaches_all_positions_is_none() -> None:
    for positions, chosen in ((14, [1]), (13, [0, 1, 2]), (None, [1])):
        assert reference("gemma2", positions=positions).chosen == chosen


def test_a_model_of_windows_only_is_refused() -> None:
    mistral = tiny.model("mistral", sliding_window=tiny.WINDOW)
    assert windows_of(mistral.config) == [13, 13, 13]
    with pytest.raises(ValueError, match="window"):
        reference(mistral)
    assert reference(mistral, positions=13).chosen == [0, 1, 2]


def test_the_broken_variants_break_families_too() -> None:
    for family in ("cohere2", "gpt-neox"):
        right = reference(family).read(PROMPT)
        for fault in ("no_reset", "mask_off_by_one", "swap_keys_values"):
            if (family, fault) == ("cohere2", "no_reset"):
                continue  # nothing that turns is moved in relation to anything
            wrong = reference(family, **{fault: True}).read(PROMPT)
            assert difference(wrong, right) > APART, (family, fault)


def test_every_entry_of_the_table_has_a_tiny_model() -> None:
    assert {model(family).config.model_type for family in tiny.FAMILIES} == set(TABLE)
