"""Graphs for ONNX Runtime: one trace, four graphs, one file of weights; and contexts for chips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport.plan import Plan, compiler
from potexport.refusing import refusing
from potexport.spec import choosing

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from potexport.calibrate import Ranges
    from potexport.graphs.model import PotModel
    from potexport.spec import Layout

Stage = Callable[[str], None]


def tools(decided: Plan) -> tuple[str, ...]:
    """The packages whose versions a bundle names, besides those of every route."""
    target = decided.target
    own = ("onnx", "onnxscript", "onnxruntime")
    return (*own, compiler(target).PACKAGE) if target.compiler else own


def write(
    decided: Plan, model: PreTrainedModel, tokenizer: Any, folder: Path, stage: Stage
) -> dict[str, Any]:
    """Write graphs and weights into the bundle, and read them back; what the manifest says of
    them. Takes over `model`."""
    from potexport import genai, store_onnx
    from potexport.facts import end_tokens
    from potexport.runtime import onnx_file

    first, ends = model.generation_config.bos_token_id, end_tokens(model.generation_config)
    models = trace(decided, model, tokenizer, folder, stage)
    if not ends:
        models.pop(genai.GRAPH, None)  # it asks for a token that ends an answer
    stage("write")
    store_onnx.save(models, folder)
    if genai.GRAPH in models:
        (folder / genai.CONFIG).write_text(genai.config(decided.layout, first, ends))
    stage("check")
    for name, spec in decided.layout.graphs().items():
        store_onnx.check(folder / f"{name}.onnx", spec)
        onnx_file.check(folder / f"{name}.onnx", store_onnx.WEIGHTS)  # as whoever opens it will
    if not decided.target.compiler:
        return {"weights": store_onnx.WEIGHTS}
    compiled = compiler(decided.target).compile_into(
        folder,
        decided.layout,
        decided.socs,
        compress_on=decided.options.compress_on,
        stage=stage,
    )
    return {"weights": store_onnx.WEIGHTS, "npu": compiled}


def trace(
    decided: Plan, model: PreTrainedModel, tokenizer: Any, folder: Path, stage: Stage
) -> dict[str, ir.Model]:
    """The graphs, in memory. Takes over `model`."""
    from potexport import (
        collector,
        fuse_onnx,
        fuse_turns,
        genai,
        lower_onnx,
        quantize,
        quantize_blocks,
        quantize_cpu,
    )
    from potexport.beside import compressing
    from potexport.compressions import compressions
    from potexport.graphs.model import PotModel

    layout, opset = decided.traced, decided.options.opset
    specs = layout.graphs()
    with refusing(layout.facts):
        core = PotModel(model, layout.facts, layout.pot)
        ranges = _ranges(decided, core, tokenizer, stage)
        squeezing = compressions(decided, core, tokenizer, folder, stage)
        beside = compressing(squeezing, specs, opset=opset, layers=layout.facts.layers)
        with collector.paused(), beside as compressed:
            models = _model_graphs(core, layout, opset, stage)
            stage("compress")
            models |= compressed()
    if decided.target.fused or layout.in_place:
        fused = ("decode", "prefill", "observe", genai.GRAPH)
        fuse_onnx.fuse(models[name] for name in fused if name in models)
    if layout.in_place:
        fuse_turns.fuse_turns(models[name] for name in squeezing)
        chosen = {choosing(name): models[name] for name in squeezing}
        models |= {name: lower_onnx.cut(model, specs[name]) for name, model in chosen.items()}
    if ranges is not None:
        quantize.a16w8(models, ranges)
    elif decided.precision in quantize_cpu.BITS and decided.target.name == "cpu":
        quantize_cpu.n_bits(models, decided.precision)
    elif decided.precision == "w4":
        quantize_blocks.w4(models)
    genai.finish(models)
    return models


def _model_graphs(core: PotModel, layout: Layout, opset: int, stage: Stage) -> dict[str, ir.Model]:
    from potexport import export, genai, lower_onnx

    stage("trace")
    whole = export.superset(core, layout, opset=opset)
    lower_onnx.fold_weight_transposes(whole)
    lower_onnx.simplify(whole)
    models = {}
    widths = {"prefill": layout.pot.chunk, "decode": 1, "observe": layout.pot.catalyst_width}
    for name, spec in layout.graphs().items():
        if name in widths:
            stage(name)
            models[name] = lower_onnx.cut(whole, spec, width=widths[name])
    if layout.in_place:
        stage("genai")
        models |= genai.begin(whole, layout)
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
    catalyst = tokenizer.encode(decided.catalyst, add_special_tokens=False)
    return calibrate.calibrate(
        core, decided.policies[0], decided.traced, ids, catalyst=catalyst, starts=starts
    )
