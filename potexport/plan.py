"""What is decided before work begins: options, checked against each other and the model's config.

Nothing here reads a weight.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport import adapters, loader, pots, targets
from potexport.bundle import PolicyFacts
from potexport.coding import FLOATS, STEP
from potexport.errors import PotexportError
from potexport.facts import model_facts, most_positions, weight_bytes, windows, without_storage
from potexport.geometry import ModelFacts, PotGeometry, default_geometry
from potexport.spec import QUANTIZED, TRACED, Layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from potexport.graphs.policies import Policy

# arXiv 2410.01518, the general catalyst (CaP-G).
CATALYST = "\n\nSummarize the previous context highlighting the most important parts."
OPSETS = (18, 23)
CATALYST_WIDTH = 32  # unless a policy looks further back
CODES_FROM_OPSET = 21  # QuantizeLinear to uint16
EXPORT_PACKAGES = (
    "torch", "transformers", "onnx", "onnxscript", "safetensors", "gguf", "accelerate"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asks of a build; None means "choose for me"."""

    model: str
    adapter: tuple[str, ...] = ()  # merged into the weights, in this order
    target: str = "cpu"
    runtime: str | None = None  # a key of targets.PACKAGES
    pot: int | None = None
    keep: int | None = None
    keep_max: int | None = None
    chunk: int | None = None
    catalyst_width: int | None = None
    sink: int | None = None
    recent: int | None = None
    positions: int | None = None
    pot_shape: str | None = (
        None  # "uniform", "pyramid", or a JSON file with the slots of each layer
    )
    # As `graphs.policies._find.parse_policy` reads them; the first is the bundle's default.
    policy: str | tuple[str, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the first policy
    precision: str | None = None
    pot_dtype: str | None = None  # one of `coding.POT_DTYPES`; None for the precision's
    soc: tuple[str, ...] = ()
    compress_on: str | None = None
    opset: int = OPSETS[1]
    catalyst: str | None = None
    calibration: Path | None = None  # text, for a16w8 and for statistics of queries
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before work begins."""

    options: Options
    source: loader.Source
    config: PreTrainedConfig
    target: targets.Target
    precision: str
    policies: tuple[tuple[PolicyFacts, Policy], ...]
    layout: Layout
    weight_bytes: int
    socs: tuple[targets.Soc, ...] = ()
    adapters: tuple[loader.Source, ...] = ()

    @property
    def traced(self) -> Layout:
        """The contract of the graphs before they are quantized."""
        return replace(self.layout, dtype=TRACED.get(self.precision, self.layout.dtype))

    @property
    def policy(self) -> Policy:
        """The first."""
        return self.policies[0][1]

    @property
    def catalyst(self) -> str:
        """What scores the pot where no question is known: nothing, if the policy can do without."""
        if self.options.catalyst is not None:
            return self.options.catalyst
        return "" if all(facts.can_be_blind for facts, _ in self.policies) else CATALYST

    @property
    def statistics(self) -> bool:
        """Whether a policy wants to know what queries look like."""
        return "queries" in self.layout.gathered

    @property
    def pot_bytes(self) -> int:
        return self.layout.memory()["pot"]


def plan(options: Options) -> Plan:
    """Check the options against each other and the model's config; reads no weights."""
    target = targets.load(options.target, options.runtime)
    socs = target.chips(options.soc)
    if target.delegate is not None and len(socs) > 1:
        raise PotexportError("a program of ExecuTorch is compiled for one chip; give one --soc")
    require_export_packages()
    _require_tools(target)
    if options.compress_on is not None and not target.compiler:
        raise PotexportError(f"target {target.name} takes no --compress-on: all of it is one place")
    precision = options.precision or target.default_precision
    if precision not in target.precisions:
        raise PotexportError(
            f"target {target.name} of {target.runtime} does not take {precision}; choose one of: "
            f"{', '.join(target.precisions)}"
        )
    if not target.lowest_opset <= options.opset <= OPSETS[1]:
        raise PotexportError(
            f"--opset is {options.opset}; it must be from {target.lowest_opset} to {OPSETS[1]}"
        )
    if precision == "a16w8":
        _can_calibrate(options)
    source = loader.resolve(options.model)
    config = loader.read_config(source, trust_remote_code=options.trust_remote_code)
    found = adapters.find(options.adapter)
    facts = model_facts(config)
    model = without_storage(config, trust_remote_code=options.trust_remote_code)
    adapters.fit(found, model)
    _can_quantize(precision, model, target)
    policies = _policies(options, model, compiled=bool(target.compiler))
    if target.compiler and len(policies) > 1:
        raise PotexportError(
            f"target {target.name} takes one --policy a bundle; {len(policies)} were given"
        )
    geometry = _geometry(facts, config, options, target, policies)
    (first, _), *others = policies
    layout = Layout(
        facts,
        geometry,
        frozenset(first.needs),
        target.precisions[precision],
        tuple((each.graph, frozenset(each.needs)) for each, _ in others),
        _pot_dtype(options, target, precision),
    )
    layout = replace(layout, in_place=_in_place(layout, target))
    _has_body(layout)
    if "queries" in layout.gathered:
        _has_calibration(options, "a policy that looks at statistics of queries needs")
    return Plan(
        options,
        source,
        config,
        target,
        precision,
        policies,
        layout,
        weight_bytes(model, precision, layout.dtype, packed_tables=target.delegate is not None),
        socs,
        found,
    )


def _pot_dtype(options: Options, target: targets.Target, precision: str) -> str:
    """What `Layout` is told; empty where the precision's type is asked for."""
    own, asked = target.precisions[precision], options.pot_dtype
    if asked is None or FLOATS.get(asked) == own:
        return ""
    if target.name != "cpu" or own != "float32":
        takes = [name for name, each in target.precisions.items() if each == "float32"]
        instead = f"--precision {' or '.join(takes)}" if target.name == "cpu" else "--target cpu"
        raise PotexportError(
            f"target {target.name} of {target.runtime} takes no --pot-dtype {asked} with "
            f"--precision {precision}; omit it, or give {instead}"
        )
    return asked


def _in_place(layout: Layout, target: targets.Target) -> bool:
    """Whether the model graphs can write into the pot: with ONNX Runtime's fused attention, which
    the CPU has for pots of float32 that are the same in all layers, and which tells nobody how its
    attention was shared."""
    plain = layout.dtype == "float32" and not layout.pot_dtype and layout.pot.uniform
    heads = layout.facts.head_size % 8 == 0
    return target.in_place and plain and heads and "received" not in layout.gathered


def _has_body(layout: Layout) -> None:
    """PotexportError for a pot that cannot be coded, or would have no slot left for codes."""
    if layout.coding is not None and layout.windowed:
        raise PotexportError(
            f"--pot-dtype {layout.pot_dtype} takes models whose layers all see the whole pot; "
            f"{len(layout.windowed)} of {layout.facts.layers} have a sliding window: omit it"
        )
    coding, fewest = layout.coding, layout.pot.slots + layout.pot.smallest
    if coding is not None and fewest <= coding.floats:
        raise PotexportError(
            f"a layer of {fewest} slots keeps {coding.floats} in full precision (sinks, recent and "
            f"{STEP} more), which leaves none for --pot-dtype {layout.pot_dtype}; give --pot at "
            f"least {layout.pot.slots + coding.floats + 1 - fewest}, or omit --pot-dtype"
        )


def _require_tools(target: targets.Target) -> None:
    """PotexportError where what lowers for this target is not installed."""
    if target.delegate is not None:
        from potexport import lower_executorch

        lower_executorch.require(target)
    elif target.compiler:
        compiler(target).require()


def _can_quantize(precision: str, model: Any, target: targets.Target) -> None:
    from potexport.graphs import experts

    if precision in QUANTIZED and experts.mixtures(model):
        plain = " or ".join(name for name in target.precisions if name not in QUANTIZED)
        raise PotexportError(
            f"--precision {precision} does not quantize the experts of {model.config.model_type} "
            f"yet; use {plain or 'another target'}"
        )


def _can_calibrate(options: Options) -> None:
    if options.opset < CODES_FROM_OPSET:
        raise PotexportError(
            f"--precision a16w8 needs --opset {CODES_FROM_OPSET} or higher; --opset is "
            f"{options.opset}"
        )
    _has_calibration(options, "--precision a16w8 needs")


def _has_calibration(options: Options, what: str) -> None:
    if options.calibration is None:
        raise PotexportError(f"{what} a text to calibrate on; give --calibration FILE")
    from potexport.calibrate import read_text

    read_text(options.calibration)


def compiler(target: targets.Target) -> Any:
    """The module that compiles for a target that has one."""
    return importlib.import_module(f"potexport.{target.compiler}")


def _policies(
    options: Options, model: PreTrainedModel, *, compiled: bool
) -> tuple[tuple[PolicyFacts, Policy], ...]:
    """What the bundle holds, the default first."""
    from potexport import defaults
    from potexport.graphs.policies._find import make_policy, parse_policy

    asked = options.policy or (defaults.COMPILED if compiled else defaults.policy(model))
    made: list[tuple[PolicyFacts, Policy]] = []
    labels: set[str] = set()
    for number, text in enumerate([asked] if isinstance(asked, str) else asked):
        name, settings = parse_policy(text)
        policy = make_policy(name, {**settings, **(options.settings if number == 0 else {})})
        names = chain([name], (f"{name}-{again}" for again in count(2)))
        label = next(each for each in names if each not in labels)
        labels.add(label)
        facts = PolicyFacts(
            label=label,
            name=name,
            needs=tuple(sorted(policy.needs)),
            settings=asdict(policy),
            graph=f"compress_{label.replace('-', '_')}" if number else "compress",
            window=policy.observed,
            can_be_blind=policy.can_be_blind,
        )
        made.append((facts, policy))
    return tuple(made)


def _geometry(
    facts: ModelFacts,
    config: PreTrainedConfig,
    options: Options,
    target: targets.Target,
    policies: tuple[tuple[PolicyFacts, Policy], ...],
) -> PotGeometry:
    names = ("keep", "keep_max", "catalyst_width", "sink", "recent", "positions")
    asked = {name: getattr(options, name) for name in names}
    slots, chunk = options.pot, options.chunk
    if slots is None and target.slots is not None and 2 * target.slots <= facts.max_positions:
        slots = target.slots
        chunk = target.chunk if chunk is None else chunk
    window = max(each.window for each, _ in policies)
    if asked["catalyst_width"] is None and window > CATALYST_WIDTH:
        asked["catalyst_width"] = window
    decide = partial(
        default_geometry,
        facts,
        slots=slots,
        chunk=chunk,
        windows=windows(config),
        most_positions=most_positions(config),
        **asked,
    )
    geometry = decide()
    if window > geometry.catalyst_width:
        raise PotexportError(
            f"a policy looks at the last {window} tokens, more than --catalyst-width "
            f"{geometry.catalyst_width}; give a larger one"
        )
    return decide(layer_slots=pots.shape(options.pot_shape, geometry, facts.layers))


def require_export_packages() -> None:
    """PotexportError where the extra `export` is not installed, or not all of it."""
    missing = [name for name in EXPORT_PACKAGES if not _has(name)]
    if missing:
        raise PotexportError(
            f"this needs {', '.join(missing)}; install with: pip install 'potexport[export]'"
        )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
