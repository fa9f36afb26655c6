"""Every policy, in each runtime: against the eager loop, and against its rule in plain words.

The names are found, not listed: a new file in `graphs/policies` is tried as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from potexport import plugins, statistics
from potexport.graphs.model import PotModel
from potexport.runtime.session import Session
from tests.parity import tolerances
from tests.parity.conftest import POT, RUNTIMES
from tests.parity.held import SPECS, WIDTH, Held, begin
from tests.parity.test_loop import (
    alike,
    difference,
    load,
    same,
    tokens,
    watch,
)
from tests.reference import Reference
from tests.reference_policies import RULES

PACKAGE = "potexport.graphs.policies"
NAMES = plugins.names(PACKAGE)
SHIPPED = {
    "streaming", "snapkv", "h2o", "tova", "sirllm", "keydiff", "vatp", "knorm", "vnorm",
    "expected-attention", "random", "infinipot", "catalyst", "blend",
}  # fmt: skip
BLEND = "blend"
PINNED, FEWER = 11, 180  # tokens


@pytest.fixture(scope="module", params=RUNTIMES)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Held:
    """All policies in one bundle."""
    folder = tmp_path_factory.mktemp("policies")
    return Held.build(folder, [SPECS.get(name, name) for name in NAMES], runtime=request.param)


def ruled(name: str) -> str:
    if name not in RULES:
        pytest.skip(f"no rule for {name} in tests/reference_policies.py; see the eager loop")
    return name


def test_every_policy_that_we_ship_has_a_rule() -> None:
    assert set(NAMES) >= SHIPPED
    assert set(RULES) >= SHIPPED


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_equals_the_eager_loop(held: Held, name: str) -> None:
    """Slot for slot over ten compressions and more, with and without a reset; and the logits."""
    sides = []
    for session in (held.session, held.oracle().session(policy=name)):
        kept = begin(session, name)
        session.feed(tokens())
        sides.append((kept, session.logits().copy(), session.backend.pot))
    (mine, logits, pot), (wanted, other, eager) = sides
    assert len(wanted) >= 10
    assert alike(mine, wanted)
    assert difference(logits, other) <= tolerances.PAST
    assert pot.position == eager.position
    for one, two in zip(pot.positions, eager.positions, strict=True):
        assert np.array_equal(one[:, : pot.fill], two[:, : pot.fill])


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_equals_the_rule_in_plain_words(held: Held, name: str) -> None:
    oracle = held.reference(ruled(name))
    kept = begin(held.session, name)
    held.session.feed(tokens())
    same(held.session, kept, oracle, oracle.read(tokens().tolist()))
    assert set(oracle.resets) == {False, True}


@pytest.mark.parametrize("name", NAMES)
def test_pinned_tokens_stay_as_sinks_do(held: Held, name: str) -> None:
    """Pinned once they were fed, whatever was read of them: to the rules they are sinks."""
    oracle = held.reference(ruled(name), sink=PINNED)
    session, kept = held.session, begin(held.session, name)
    session.feed(tokens()[:PINNED])
    assert session.pin() == session.pinned == PINNED
    session.feed(tokens(FEWER)[PINNED:])
    same(session, kept, oracle, oracle.read(tokens(FEWER).tolist()), least=5)
    assert set(oracle.resets) == {False, True}
    assert all((slots[:, :PINNED] == np.arange(PINNED)).all() for each in kept for slots in each)
    assert session.pinned == PINNED


@pytest.mark.parametrize("held", RUNTIMES[:1], indirect=True)  # no runtime takes part
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", [POT["pot"] + WIDTH, 512])
def test_the_eager_loop_equals_the_rule_where_all_or_none_begin_anew(
    held: Held, name: str, positions: int
) -> None:
    """As few positions as there can be: every compression moves all to the front. And so many that
    none does."""
    session = held.oracle(positions=positions).session(policy=ruled(name))
    kept = begin(session, name)
    session.feed(tokens())
    oracle = held.reference(name, positions=positions)
    same(session, kept, oracle, oracle.read(tokens().tolist()))
    assert set(oracle.resets) == {positions < 512}


@pytest.mark.parametrize("fault", ["no_reset", "positions_left_behind"])
@pytest.mark.parametrize("name", ["keydiff", "h2o"])
def test_a_broken_rule_is_told_apart(held: Held, name: str, fault: str) -> None:
    """Were these to agree, the tests above could not fail."""
    begin(held.session, name)
    held.session.feed(tokens())
    wanted = held.reference(name, **{fault: True}).read(tokens().tolist())
    assert difference(held.session.logits(), wanted) > 100 * tolerances.PAST


@pytest.mark.parametrize("name", [name for name in NAMES if name in RULES and name != "streaming"])
def test_another_rule_is_told_apart(held: Held, name: str) -> None:
    kept = begin(held.session, name)
    held.session.feed(tokens(100))
    oracle = held.reference("streaming")
    oracle.read(tokens(100).tolist())
    assert not alike(kept, oracle.kept)


def fills_of(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Occupied slots before each compression from now on."""
    fills, compress = list[int](), session.backend.compress

    def watched(keep: int, *, reset: bool = True) -> list[Any]:
        fills.append(session.backend.pot.fill)
        return compress(keep, reset=reset)

    monkeypatch.setattr(session.backend, "compress", watched)
    return fills


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forced_stays_and_the_rest_ascends(
    held: Held, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, pot = held.session, held.session.manifest.pot
    kept, fills = begin(session, name), fills_of(session, monkeypatch)
    keeps: list[int] = []
    for keep in (pot.keep, 6, pot.keep_max):
        session.keep = keep
        session.feed(tokens(100))
        keeps += [keep] * (len(kept) - len(keeps))
    assert len(set(keeps)) == 3
    for fill, keep, layers in zip(fills, keeps, kept, strict=True):
        for slots in layers:
            assert slots.shape == (2, keep)
            assert (np.diff(slots, axis=1) > 0).all()
            assert (slots[:, : pot.sink] == np.arange(pot.sink)).all()
            assert (slots[:, -pot.recent :] == np.arange(fill - pot.recent, fill)).all()


class Switching(Reference):
    """Another policy for each compression. order: (name, settings) of each."""

    order: Iterator[tuple[str, dict[str, Any]]]

    def compress(self, keep: int) -> None:
        self.policy, self.settings = next(self.order)
        super().compress(keep)


def switching(held: Held, order: list[str]) -> Any:
    """The independent loop with a policy for each compression."""
    oracle = held.reference("streaming")
    oracle.__class__ = Switching
    oracle.order = ((name, held.session.manifest.policy_of(name).settings) for name in order)
    return oracle


def test_a_session_may_change_its_policy_at_any_time(held: Held) -> None:
    """What a policy needs was gathered while another one was used: each is asked for just before a
    compression."""
    order = ["keydiff", "snapkv", "h2o", "knorm", "vatp", "infinipot", "tova", "snapkv", BLEND]
    ids = tokens(49 + 24 * len(order))  # the pot and a token; then as many as a compression frees
    session, kept = held.session, begin(held.session, "streaming")
    session.feed(ids[:49])
    assert not kept
    for number, name in enumerate(order):
        session.policy = name
        session.feed(ids[49 + 24 * number : 73 + 24 * number])
        assert len(kept) == number + 1
    oracle = switching(held, order)
    logits = oracle.read(ids.tolist())
    same(session, kept, oracle, logits, least=len(order))


@pytest.mark.parametrize("name", ["snapkv", "h2o", "sirllm", BLEND])
def test_a_snapshot_goes_on_bit_for_bit(held: Held, name: str) -> None:
    session = held.session
    begin(session, name)
    session.feed(tokens(150))
    state, ends = session.snapshot(), []
    for _ in range(3):  # of the same state
        kept = watch(session)
        session.feed(tokens()[150:300])
        ends.append((session.logits().copy(), kept, session.stats.tokens_read))
        session.restore(state)
    begin(session, name)
    kept = watch(session)
    session.feed(tokens(300))
    assert np.array_equal(session.logits(), ends[0][0])
    assert alike(kept[-len(ends[0][1]) :], ends[0][1])
    for logits, again, read in ends:
        assert np.array_equal(logits, ends[0][0])
        assert alike(again, ends[0][1])
        assert read == ends[0][2] == 300


def test_a_snapshot_holds_what_was_not_read_yet(held: Held) -> None:
    """Logits that nothing followed, the novelty of what does, and tokens that wait."""
    session = held.session
    begin(session, "sirllm")
    session.feed(tokens(45))
    best = int(session.logits().argmax())
    state = session.snapshot()
    answers = []
    for other in (7, best, best):
        session.accept(other)
        for _ in range(20):
            other = int(session.logits().argmax())
            session.accept(other)
        answers.append((session.logits().copy(), session.stats.tokens_generated))
        session.restore(state)
    assert np.array_equal(answers[1][0], answers[2][0])
    assert not np.array_equal(answers[0][0], answers[1][0])
    assert [count for _, count in answers] == [21] * 3


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_keep_auto_keeps_the_smallest_set_that_holds_the_mass(
    held: Held, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the slots that the policy keeps, forced ones included."""
    session, pot = held.session, held.session.manifest.pot
    begin(session, "catalyst")
    session.keep, session.keep_mass = "auto", share
    fills, sizes, wanted = fills_of(session, monkeypatch), list[int](), list[int]()

    def on_compress(slots: list[Any]) -> None:
        heads = [head[: fills[-1]].tolist() for each in session.backend.pot.mass for head in each]
        most = min(pot.keep_max, fills[-1])
        for keep in range(pot.sink + pot.recent, most + 1):
            held_by = sum(holding(head, keep, pot.sink, pot.recent) for head in heads)
            if held_by >= share * sum(map(sum, heads)):
                break
        sizes.append(slots[0].shape[1])
        wanted.append(keep)

    session.on_compress = on_compress
    session.feed(tokens())
    assert len(wanted) >= 5
    assert sizes == wanted


def holding(mass: list[float], keep: int, sink: int, recent: int) -> float:
    """What the forced slots and the best of the others have, `keep` of them."""
    forced = mass[:sink] + mass[len(mass) - recent :]
    others = sorted(mass[sink : len(mass) - recent], reverse=True)
    return sum(forced) + sum(others[: keep - len(forced)])


def test_a_blend_without_a_catalyst_takes_no_extra_pass(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, kept = held.session, begin(held.session, BLEND)
    session.set_catalyst("")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pass that nothing needs")

    monkeypatch.setattr(session.backend, "observe", never)
    session.feed(tokens())
    oracle = held.reference(BLEND, catalyst=None)
    same(session, kept, oracle, oracle.read(tokens().tolist()))


@pytest.mark.parametrize("held", RUNTIMES[:1], indirect=True)
@torch.no_grad()
def test_statistics_are_those_of_the_models_queries(held: Held) -> None:
    """By hooks on the untouched model, one pass over a text that fits the pot."""
    manifest, model = held.session.manifest, load(held.model)
    queries: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, __, out: queries.append(out[0].unflatten(-1, (6, -1)).transpose(0, 1))
        )
    ids = tokens(POT["pot"])
    model(torch.from_numpy(ids[None].astype(np.int64)))
    core = PotModel(load(held.model), manifest.model, manifest.pot)
    found = statistics.measure(core, manifest.layout, ids)
    for layer, each in enumerate(queries):
        plain = each[:, statistics.SINKS :]  # (Hq, n, D)
        middle = plain - plain.mean(dim=1, keepdim=True)
        spread = middle.transpose(1, 2) @ middle / plain.shape[1]
        assert difference(found[0][layer], plain.mean(dim=1)) < 1e-5
        assert difference(found[1][layer], spread) < 1e-5
