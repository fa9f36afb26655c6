"""Policies by what a person writes: names, settings, blends, and what is listed of each."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from potexport import defaults, facts, pipeline, plugins, show_policies
from potexport.errors import PotexportError
from potexport.graphs.policies import NEEDS, Policy
from potexport.graphs.policies._find import PACKAGE, make_policy, parse_policy, policy_class
from potexport.plan import CATALYST
from tests import tiny

BLIND = "blend:keydiff + 2*catalyst"
NAMES = plugins.names(PACKAGE)


def policy_of(text: str) -> Policy:
    return make_policy(*parse_policy(text))


def test_names_and_settings_are_read() -> None:
    assert parse_policy("streaming") == ("streaming", {})
    assert parse_policy(" keydiff : pool = 3 , rotated = True ") == (
        "keydiff",
        {"pool": 3, "rotated": True},
    )
    assert parse_policy("infinipot:alpha=0") == ("infinipot", {"alpha": 0.0})
    assert parse_policy("keydiff:") == ("keydiff", {})
    assert parse_policy("blend: a + b:c") == ("blend", {"mix": "a + b:c"})


def test_a_blend_is_its_terms() -> None:
    mixed: Any = policy_of("blend:keydiff(pool=3,rotated=true) + 2*catalyst+ -.5*snapkv(window=4)")
    weights, terms = zip(*mixed.terms, strict=True)
    assert weights == (1.0, 2.0, -0.5)
    assert terms == (
        policy_of("keydiff:pool=3,rotated=true"),
        policy_of("catalyst"),
        policy_of("snapkv:window=4"),
    )
    assert mixed.needs == {"keys", "mass", "window"}
    assert (mixed.observed, mixed.can_be_blind) == (4, True)
    assert not policy_of("blend:catalyst + 2*infinipot").can_be_blind
    assert not policy_of("infinipot").can_be_blind
    two: Any = policy_of("blend:snapkv(window=4) + vatp(window=4)")
    assert two.observed == 4  # one window serves both


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nosuch", "no 'nosuch' among the policies; choose one of: .*keydiff, knorm"),
        ("KeyDiff", "no 'KeyDiff' among"),
        ("", "no '' among"),
        ("_find", "no '_find' among"),
        ("keydiff:pool=three", "pool of the policy keydiff is 'three'; it must be a whole number"),
        ("keydiff:pool=3.0", "must be a whole number"),
        ("keydiff:rotated=perhaps", "must be true or false"),
        ("infinipot:alpha=much", "must be a number"),
        ("infinipot:alpha=nan", "from 0 to 1"),
        ("infinipot:alpha=-0.1", "from 0 to 1"),
        ("keydiff:pool", "'pool' of the policy keydiff is no setting; write name=value"),
        ("keydiff:beta=1", "beta does not apply to the policy keydiff; it has pool, rotated"),
        ("streaming:pool=3", "it has no settings"),
        ("keydiff:pool=4", "it must be odd"),
        ("keydiff:pool=-1", "it must be odd"),
        ("snapkv:window=0", "--window is 0; it must be at least 1"),
        ("expected-attention:future=0", "at least 1"),
        ("blend:", "does not parse; write such as"),
        ("blend:keydiff +", "does not parse"),
        ("blend:keydiff - catalyst", "'keydiff - catalyst' in the blend .* does not parse"),
        ("blend:2 keydiff", "does not parse"),
        ("blend:nan*keydiff", "does not parse"),
        ("blend:keydiff(pool=3", "does not parse"),
        ("blend:keydiff(pool=x)", "must be a whole number"),
        ("blend:keydiff + nosuch", "no 'nosuch' among"),
        ("blend:keydiff + 2*blend", "holds a blend; name its terms instead"),
        ("blend:snapkv(window=8) + tova", "the last 1 and of the last 8 tokens; one window"),
    ],
)
def test_what_does_not_parse_is_one_line(text: str, says: str) -> None:
    with pytest.raises(PotexportError, match=says) as caught:
        policy_of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_tells_what_it_is_and_what_it_costs(name: str) -> None:
    kind = policy_class(name)
    policy = kind()  # its settings have defaults
    assert policy.needs <= NEEDS
    assert ("window" in policy.needs) == (policy.observed > 0)
    assert show_policies.summary(kind.__module__).endswith(".")
    assert show_policies.source(kind)
    assert "Source:" in (inspect.getdoc(kind) or "")
    costs = show_policies.costs(policy.needs)
    assert bool(costs["passes"]) == bool(policy.needs & {"mass", "window"})
    assert bool(costs["outputs"]) == bool(policy.needs & {"novelty", "received"})
    assert bool(costs["build"]) == ("queries" in policy.needs)


def test_sources_are_short() -> None:
    sources = {name: show_policies.source(policy_class(name)) for name in NAMES}
    assert sources["snapkv"] == "arXiv 2404.14469"
    assert all(len(source) < 60 for source in sources.values()), sources


# Of a model's size


def test_there_is_a_default_for_every_size() -> None:
    sizes = [each.up_to for each in defaults.TABLE]
    assert sizes == sorted(sizes)
    assert sizes[-1] == float("inf")
    for each in defaults.TABLE:
        policy_of(each.policy)
        assert each.evidence


def test_the_default_goes_by_parameters() -> None:
    small, large = LlamaConfig(num_hidden_layers=1), LlamaConfig()  # 0.5e9 and 6.7e9
    models = [facts.without_storage(each, trust_remote_code=False) for each in (small, large)]
    chosen = [defaults.policy(each) for each in models]
    assert chosen == [defaults.TABLE[0].policy, defaults.TABLE[-1].policy]


# What a build makes of them


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


def planned(model: Path, *policies: str, **options: Any) -> pipeline.Plan:
    pot = {"pot": 48, "chunk": 8, "sink": 2, "recent": 3}
    return pipeline.plan(
        pipeline.Options(model=str(model), policy=policies or None, **{**pot, **options})
    )


def test_a_plan_makes_the_model_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without storage; for the default policy and for the bytes of the weights."""
    auto: Any = AutoModelForCausalLM
    make, made = auto.from_config, []

    def counted(*of: Any, **how: Any) -> Any:
        made.append(make(*of, **how))
        return made[-1]

    monkeypatch.setattr(auto, "from_config", counted)
    decided = planned(model)
    assert decided.policies[0][0].name == "blend"
    assert decided.weight_bytes == 4 * sum(weight.numel() for weight in made[0].parameters())
    assert len(made) == 1
    assert all(weight.is_meta for weight in made[0].parameters())


def test_each_policy_has_a_label_and_a_graph(model: Path) -> None:
    made = planned(model, "keydiff", "snapkv:window=4", "keydiff:pool=3", "keydiff:pool=1")
    facts = [each for each, _ in made.policies]
    assert [each.label for each in facts] == ["keydiff", "snapkv", "keydiff-2", "keydiff-3"]
    compressions = [name for name in made.layout.graphs() if name.startswith("compress")]
    assert compressions == [
        "compress",
        "compress_snapkv",
        "compress_keydiff_2",
        "compress_keydiff_3",
    ]
    assert [each.graph for each in facts] == compressions
    assert [each.window for each in facts] == [0, 4, 0, 0]
    assert made.layout.gathered == {"keys", "window"}
    assert made.catalyst == ""  # the first can do without
    assert "observe" in made.layout.graphs()


def test_no_pass_and_no_output_that_nothing_needs(model: Path) -> None:
    graphs = planned(model, "keydiff").layout.graphs()
    assert set(graphs) == {"prefill", "decode", "compress"}
    outputs = {tensor.name for tensor in graphs["prefill"].outputs}
    assert not {name for name in outputs if "present" not in name}
    received = planned(model, "h2o", "sirllm").layout.graphs()
    assert set(received) == {"prefill", "decode", "compress", "compress_sirllm"}
    for name in ("prefill", "decode"):
        outputs = {tensor.name for tensor in received[name].outputs}
        assert {"mass.0", "new_mass.1"} <= outputs
    assert "novelty" in {tensor.name for tensor in received["prefill"].outputs}


def test_a_window_makes_the_pass_as_wide(model: Path) -> None:
    assert planned(model, "snapkv:window=40").layout.pot.catalyst_width == 40
    with pytest.raises(PotexportError, match="the last 32 tokens, more than --catalyst-width 8"):
        planned(model, "keydiff", "snapkv", catalyst_width=8)


def test_statistics_want_a_text(model: Path) -> None:
    with pytest.raises(PotexportError, match="give --calibration FILE"):
        planned(model, "keydiff", "expected-attention")


def test_a_general_catalyst_where_any_policy_needs_one(model: Path) -> None:
    for policies in (("infinipot",), ("keydiff", "infinipot"), ("blend", "catalyst")):
        assert planned(model, *policies).catalyst == CATALYST
    assert planned(model, "infinipot", catalyst="Why?").catalyst == "Why?"
    assert planned(model, "keydiff", BLIND).catalyst == ""
    assert planned(model).catalyst == ""  # the default blend can do without
