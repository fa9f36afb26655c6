"""`build`: from a model to a bundle, as a table of contents.

What a person can get wrong is refused in `plan`, before any weight is read; `build` writes to a
temporary folder and renames it when everything in it was read back and checked.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport import __version__, bundle, loader, targets
from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.facts import model_facts, weight_bytes
from potexport.spec import (
    PRECISIONS,
    TRACED,
    Layout,
    ModelFacts,
    PotGeometry,
    default_geometry,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedConfig, PreTrainedModel

    from potexport.calibrate import Ranges
    from potexport.graphs.model import PotModel
    from potexport.graphs.policies import Policy

# arXiv 2410.01518, the general catalyst (CaP-G).
CATALYST = "\n\nSummarize the previous context highlighting the most important parts."
OPSETS = (18, 23)
CODES_FROM_OPSET = 21  # QuantizeLinear to uint16
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
EXPORT_PACKAGES = (
    "torch", "transformers", "onnx", "onnxscript", "safetensors", "gguf", "accelerate"
)  # fmt: skip
Stage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asks of a build; None means "choose for me"."""

    model: str
    target: str = "cpu"
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
        return replace(self.layout, dtype=TRACED[self.precision])

    @property
    def pot_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.layout.past())


def plan(options: Options) -> Plan:
    """Check the options against each other and the model's config; reads no weights."""
    target = targets.load(options.target)
    socs = target.chips(options.soc)
    require_export_packages()
    if target.compiler:
        _compiler(target).require()
    if options.compress_on is not None and not target.compiler:
        raise PotexportError(f"target {target.name} takes no --compress-on: all of it is one place")
    from potexport.graphs.policies._find import make_policy

    policy = make_policy(options.policy, options.settings)
    precision = options.precision or target.default_precision
    if precision not in target.precisions:
        raise PotexportError(
            f"target {target.name} does not take {precision}; choose one of: "
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
    layout = Layout(facts, geometry, policy.needs, PRECISIONS[precision])
    return Plan(
        options,
        source,
        config,
        target,
        precision,
        policy,
        layout,
        weight_bytes(config, precision, trust_remote_code=options.trust_remote_code),
        socs,
    )


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


def _compiler(target: targets.Target) -> Any:
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


def build(
    options: Options, output: Path, *, force: bool = False, stage: Stage = lambda _: None
) -> Manifest:
    """Make a bundle. `stage` is told the name of each step as it begins.

    Raises PotexportError for what a person can change; nothing is left on disk then.
    """
    bundle.refuse_existing(output, force=force)
    stage("plan")
    decided = plan(options)
    from potexport import store_onnx

    with bundle.new_folder(output, force=force) as folder:
        stage("weights")
        model, tokenizer = load(decided)
        models = trace(decided, model, tokenizer, stage)
        stage("write")
        store_onnx.save(models, folder)
        stage("text")
        loader.save_tokenizer(tokenizer, folder)
        model.generation_config.save_pretrained(folder)
        stage("check")
        _check(decided, folder)
        compiled = compile_for_chips(decided, folder, stage)
        stage("seal")
        bundle.seal(folder, replace(_manifest(decided, model), npu=compiled))
        return bundle.read(folder)


def compile_for_chips(decided: Plan, folder: Path, stage: Stage) -> tuple[bundle.Npu, ...]:
    """The contexts of each chip; none where the target's runtime takes the graphs as they are."""
    if not decided.target.compiler:
        return ()
    made: tuple[bundle.Npu, ...] = _compiler(decided.target).compile_into(
        folder, decided.layout, decided.socs, compress_on=decided.options.compress_on, stage=stage
    )
    return made


def load(decided: Plan) -> tuple[PreTrainedModel, Any]:
    """The model, untouched, in the build's float type, and its tokenizer."""
    import torch

    tokenizer = loader.load_tokenizer(decided.source)
    loader.tokenizer_matches(tokenizer, decided.config)
    model = loader.load_model(
        decided.source,
        dtype=getattr(torch, decided.traced.dtype),
        attn_implementation="eager",  # every model has it; ours takes its place
        trust_remote_code=decided.options.trust_remote_code,
    )
    return model, tokenizer


def trace(
    decided: Plan, model: PreTrainedModel, tokenizer: Any, stage: Stage
) -> dict[str, ir.Model]:
    """The four graphs, in memory. Takes over `model`."""
    from potexport import export, lower_onnx, quantize, quantize_blocks
    from potexport.graphs.compress import Compress
    from potexport.graphs.model import PotModel

    layout, opset = decided.traced, decided.options.opset
    specs = layout.graphs()
    with _refusing(layout.facts):
        core = PotModel(model, layout.pot)
        core.check_turn(layout.facts)
        ranges = _ranges(decided, core, tokenizer, stage)
        stage("trace")
        whole = export.superset(core, layout, opset=opset)
    lower_onnx.fold_weight_transposes(whole)
    lower_onnx.simplify(whole)
    models = {}
    widths = {"prefill": layout.pot.chunk, "decode": 1, "observe": layout.pot.catalyst_width}
    for name in specs:
        stage(name)
        if name == "compress":
            compress = export.compress(
                Compress(decided.policy, layout.pot, core.turn), layout, opset=opset
            )
            models[name] = lower_onnx.cut(compress, specs[name])
        else:
            models[name] = lower_onnx.cut(whole, specs[name], width=widths[name])
    if ranges is not None:
        quantize.a16w8(models, ranges)
    elif decided.precision == "w4":
        quantize_blocks.w4(models)
    return models


def _ranges(decided: Plan, core: PotModel, tokenizer: Any, stage: Stage) -> Ranges | None:
    """What a quantization of activations needs to know, by running the loop; None for others."""
    if decided.precision != "a16w8":
        return None
    from potexport import calibrate

    stage("calibrate")
    assert decided.options.calibration is not None  # `plan` saw to it
    text = calibrate.read_text(decided.options.calibration)
    ids, starts = calibrate.tokens(text, tokenizer, decided.traced)
    catalyst = tokenizer.encode(decided.options.catalyst, add_special_tokens=False)
    return calibrate.calibrate(
        core, decided.policy, decided.traced, ids, catalyst=catalyst, starts=starts
    )


@contextmanager
def _refusing(facts: ModelFacts) -> Iterator[None]:
    """Turn whatever goes wrong in a model's own code into one line, with the cause kept.

    Running it over a pot, or tracing it, can fail in as many ways as models have authors.
    """
    try:
        yield
    except (PotexportError, MemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (str(first).strip() or "no message").splitlines()[0][:200]
        raise PotexportError(
            f"model type {facts.model_type!r} is not supported yet: its code does not run over a "
            f"pot ({type(first).__name__}: {reason}); choose a Llama-like decoder"
        ) from error


def _check(decided: Plan, folder: Path) -> None:
    """Read every graph back and hold it against the contract."""
    from potexport import store_onnx

    for name, spec in decided.layout.graphs().items():
        store_onnx.check(folder / f"{name}.onnx", spec)


def _manifest(decided: Plan, model: PreTrainedModel) -> Manifest:
    from dataclasses import asdict

    from potexport.store_onnx import WEIGHTS

    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return Manifest(
        model=decided.layout.facts,
        pot=decided.layout.pot,
        policy=PolicyFacts(
            decided.options.policy, tuple(sorted(decided.layout.needs)), asdict(decided.policy)
        ),
        precision=decided.precision,
        target=decided.target.name,
        runtime=decided.target.runtime,
        catalyst=decided.options.catalyst,
        source=Path(decided.source.location).name
        if decided.source.kind != "hub"
        else str(decided.source),
        eos_token_ids=tuple(ends),
        graphs=decided.layout.graphs(),
        weights=WEIGHTS,
        tools={
            "potexport": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _tools(decided.target)},
        },
    )


def _tools(target: targets.Target) -> tuple[str, ...]:
    return (*TOOLS, _compiler(target).PACKAGE) if target.compiler else TOOLS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def require_export_packages() -> None:
    """PotexportError where the extra `export` is not installed, or not all of it."""
    missing = [name for name in EXPORT_PACKAGES if not _has(name)]
    if missing:
        raise PotexportError(
            f"this needs {', '.join(missing)}; install with: pip install 'potexport[export]'"
        )


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
