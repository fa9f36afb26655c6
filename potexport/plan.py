"""What is decided before work begins: options, checked against each other and the model's config.

Nothing here reads a weight.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport import loader, targets
from potexport.errors import PotexportError
from potexport.facts import model_facts, weight_bytes
from potexport.spec import (
    TRACED,
    Layout,
    ModelFacts,
    PotGeometry,
    default_geometry,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from potexport.graphs.policies import Policy

# arXiv 2410.01518, the general catalyst (CaP-G).
CATALYST = "\n\nSummarize the previous context highlighting the most important parts."
OPSETS = (18, 23)
CODES_FROM_OPSET = 21  # QuantizeLinear to uint16
EXPORT_PACKAGES = (
    "torch", "transformers", "onnx", "onnxscript", "safetensors", "gguf", "accelerate"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asks of a build; None means "choose for me"."""

    model: str
    target: str = "cpu"
    runtime: str | None = None  # a key of targets.PACKAGES
    pot: int | None = None
    keep: int | None = None
    keep_max: int | None = None
    chunk: int | None = None
    catalyst_width: int | None = None
    sink: int | None = None
    recent: int | None = None
    policy: str = "infinipot"
    settings: dict[str, Any] = field(default_factory=dict)  # of the policy
    precision: str | None = None
    soc: tuple[str, ...] = ()
    compress_on: str | None = None
    opset: int = OPSETS[1]
    catalyst: str = CATALYST
    calibration: Path | None = None  # text, for a16w8
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before work begins."""

    options: Options
    source: loader.Source
    config: PreTrainedConfig
    target: targets.Target
    precision: str
    policy: Policy
    layout: Layout
    weight_bytes: int
    socs: tuple[targets.Soc, ...] = ()

    @property
    def traced(self) -> Layout:
        """The contract of the graphs before they are quantized."""
        return replace(self.layout, dtype=TRACED.get(self.precision, self.layout.dtype))

    @property
    def pot_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.layout.past())


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
    from potexport.graphs.policies._find import make_policy

    policy = make_policy(options.policy, options.settings)
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
    facts = model_facts(config)
    geometry = _geometry(facts, options, target)
    layout = Layout(facts, geometry, policy.needs, target.precisions[precision])
    return Plan(
        options,
        source,
        config,
        target,
        precision,
        policy,
        layout,
        weight_bytes(
            config,
            precision,
            layout.dtype,
            packed_tables=target.delegate is not None,
            trust_remote_code=options.trust_remote_code,
        ),
        socs,
    )


def _require_tools(target: targets.Target) -> None:
    """PotexportError where what lowers for this target is not installed."""
    if target.delegate is not None:
        from potexport import lower_executorch

        lower_executorch.require(target)
    elif target.compiler:
        compiler(target).require()


def _can_calibrate(options: Options) -> None:
    if options.opset < CODES_FROM_OPSET:
        raise PotexportError(
            f"--precision a16w8 needs --opset {CODES_FROM_OPSET} or higher; --opset is "
            f"{options.opset}"
        )
    if options.calibration is None:
        raise PotexportError(
            "--precision a16w8 needs a text to calibrate on; give --calibration FILE"
        )
    from potexport.calibrate import read_text

    read_text(options.calibration)


def compiler(target: targets.Target) -> Any:
    """The module that compiles for a target that has one."""
    return importlib.import_module(f"potexport.{target.compiler}")


def _geometry(facts: ModelFacts, options: Options, target: targets.Target) -> PotGeometry:
    names = ("keep", "keep_max", "catalyst_width", "sink", "recent")
    slots, chunk = options.pot, options.chunk
    if slots is None and target.slots is not None and 2 * target.slots <= facts.max_positions:
        slots = target.slots
        chunk = target.chunk if chunk is None else chunk
    return default_geometry(
        facts, slots=slots, chunk=chunk, **{name: getattr(options, name) for name in names}
    )


def require_export_packages() -> None:
    """PotexportError where the extra `export` is not installed, or not all of it."""
    missing = [name for name in EXPORT_PACKAGES if not _has(name)]
    if missing:
        raise PotexportError(
            f"this needs {', '.join(missing)}; install with: pip install 'potexport[export]'"
        )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
