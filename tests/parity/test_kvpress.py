"""One compression of a whole context, by us and by kvpress: the same slots.

kvpress is NVIDIA's, for PyTorch, and shares no code with us. Our side is the eager loop over a pot
that the context just fills, with no slot forced but the sinks of `streaming`. Where the two differ
on purpose, the test says how, takes that out, and asks for equality again:

- snapkv: kvpress divides by the whole width of its pool at the first slots too, of which there are
  fewer; we divide by as many as there are.
- keydiff, knorm: we round scores to 1/1024, so that runtimes agree about ties.
- expected-attention: kvpress leaves sinks out of the softmax and of the statistics of queries, we
  of the statistics only. Here there are none.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from potexport import statistics
from potexport.bundle import PolicyFacts
from potexport.facts import model_facts
from potexport.geometry import PotGeometry
from potexport.graphs.model import PotModel
from potexport.graphs.policies._find import make_policy, parse_policy
from potexport.reference import TorchBackend
from potexport.spec import Layout
from tests import tiny
from tests.parity.test_loop import tokens

CONTEXT, KEEP, WINDOW, POOL, FUTURE = 48, 24, 8, 5, 100
FAMILIES = ["llama", "qwen2", "qwen3"]
# Its new name is newer than some of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@pytest.fixture(scope="module", autouse=True)
def kvpress() -> Any:
    """Its package without what `import kvpress` does besides: it wraps the attention functions of
    transformers, ours among them, and wants packages that no press here needs."""
    found = importlib.util.find_spec("kvpress")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no kvpress here: pip install --no-deps kvpress==0.5.5")
    package = ModuleType("kvpress")
    package.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvpress", package)
        yield
        for name in [name for name in sys.modules if name.startswith("kvpress.")]:
            del sys.modules[name]


def press(file: str, name: str, **settings: Any) -> Any:
    made = getattr(importlib.import_module(f"kvpress.presses.{file}"), name)
    return made(compression_ratio=1 - KEEP / CONTEXT, **settings)


def scores_of(made: Any, family: str) -> list[Tensor]:
    """Of each layer (Hkv, CONTEXT), by a press; a plain pass of the untouched model."""
    model, cache, calls = tiny.model(family), DynamicCache(), list[Any]()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.rotary_emb = model.model.rotary_emb  # as a press does to the model
        attention.register_forward_hook(
            lambda module, _, given, __: calls.append((module, given)), with_kwargs=True
        )
    ids = torch.from_numpy(tokens(CONTEXT)[None].astype(np.int64))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        scores = [
            made.score(
                module,
                given["hidden_states"],
                cache.layers[module.layer_idx].keys,
                cache.layers[module.layer_idx].values,
                None,
                given,
            )
            for module, given in calls
        ]
    return [each[0].float() for each in scores]


def best(scores: list[Tensor]) -> list[np.ndarray[Any, Any]]:
    """The slots that a press keeps of each layer, as `ScorerPress.compress` does."""
    return [each.topk(KEEP, dim=-1).indices.sort(dim=-1).values.numpy() for each in scores]


@torch.no_grad()
def ours(text: str, family: str, *, sink: int = 0) -> list[np.ndarray[Any, Any]]:
    """The slots that we keep of each layer."""
    policy = make_policy(*parse_policy(text))
    facts = PolicyFacts("it", "it", tuple(policy.needs), {}, window=policy.observed)
    model = tiny.model(family)
    geometry = PotGeometry(CONTEXT, 8, KEEP, 40, WINDOW, sink, 0, positions=200)
    layout = Layout(model_facts(model.config), geometry, frozenset(policy.needs))
    core, ids = PotModel(model, layout.facts, geometry), tokens(CONTEXT)
    known = statistics.measure(core, layout, ids) if "queries" in policy.needs else None
    backend = TorchBackend(core, [(facts, policy)], layout, known)
    for first in range(0, CONTEXT, 8):
        chunk = ids[first : first + 8]
        backend.prefill(chunk, chunk, 0.0)
    if facts.window:
        backend.observe(ids[-facts.window :], back=facts.window, into="window")
    return backend.compress(KEEP, reset=False)


def same(one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming(family: str) -> None:
    theirs = best(scores_of(press("streaming_llm_press", "StreamingLLMPress", n_sink=4), family))
    assert same(ours("streaming", family, sink=4), theirs)
    assert not same(ours("streaming", family, sink=3), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_tova(family: str) -> None:
    theirs = best(scores_of(press("tova_press", "TOVAPress"), family))
    assert same(ours("tova", family), theirs)
    assert not same(ours("snapkv:window=8,pool=1", family), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_snapkv(family: str) -> None:
    scores = scores_of(
        press("snapkv_press", "SnapKVPress", window_size=WINDOW, kernel_size=POOL), family
    )
    half = POOL // 2
    for each in scores:
        each[:, :half] *= POOL / torch.arange(half + 1, POOL)
    mine = ours(f"snapkv:window={WINDOW},pool={POOL}", family)
    assert same(mine, best(scores))
    # Without pooling nothing is taken out.
    unpooled = press("snapkv_press", "SnapKVPress", window_size=WINDOW, kernel_size=1)
    assert same(ours(f"snapkv:window={WINDOW},pool=1", family), best(scores_of(unpooled, family)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "file", "name"),
    [
        ("keydiff:rotated=true,pool=1", "keydiff_press", "KeyDiffPress"),
        ("knorm", "knorm_press", "KnormPress"),
    ],
)
def test_keydiff_and_knorm(family: str, text: str, file: str, name: str) -> None:
    scores, mine = scores_of(press(file, name), family), ours(text, family)
    stepped = [torch.round(each * 1024) / 1024 for each in scores]
    for kept, theirs, rounded in zip(mine, scores, stepped, strict=True):
        for slots, exact, coarse in zip(kept, theirs, rounded, strict=True):
            last = exact.topk(KEEP).values[-1]
            near = {i for i in range(CONTEXT) if abs(exact[i] - last) <= 1 / 1024}
            assert set(slots.tolist()) ^ set(exact.topk(KEEP).indices.tolist()) <= near
            ranked = sorted(range(CONTEXT), key=lambda slot: (-float(coarse[slot]), slot))
            assert slots.tolist() == sorted(ranked[:KEEP])


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SINKS", 0)
    settings = {"n_future_positions": FUTURE, "n_sink": 0}
    made = press("expected_attention_press", "ExpectedAttentionPress", **settings)
    theirs = best(scores_of(made, family))
    assert same(ours(f"expected-attention:future={FUTURE}", family), theirs)
    assert not same(ours("expected-attention:future=1", family), theirs)
