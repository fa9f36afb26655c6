"""`build`: from a model to a bundle, as a table of contents.

What a person can get wrong is refused in `plan`, before any weight is read; `build` writes to a
temporary folder and renames it when everything in it was read back and checked.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport import __version__, adapters, bundle, collector, folders, loader
from potexport.bundle import Manifest
from potexport.facts import end_tokens
from potexport.plan import Options, Plan, plan, require_export_packages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Options", "Plan", "build", "plan", "require_export_packages"]
TOOLS = ("torch", "transformers")
Stage = Callable[[str], None]


def build(
    options: Options, output: Path, *, force: bool = False, stage: Stage = lambda _: None
) -> Manifest:
    """Make a bundle. `stage` is told the name of each step as it begins.

    Raises PotexportError for what a person can change; nothing is left on disk then.
    """
    folders.refuse_existing(output, force=force)
    stage("plan")
    with collector.paused():  # most of it is imports
        decided = plan(options)
    with folders.new_folder(output, force=force) as folder:
        stage("weights")
        model, tokenizer = load(decided)
        generation = model.generation_config
        stage("text")
        loader.save_tokenizer(tokenizer, folder)
        generation.save_pretrained(folder)
        made = route(decided).write(decided, model, tokenizer, folder, stage)
        stage("seal")
        folders.seal(folder, _manifest(decided, end_tokens(generation), made))
        return bundle.read(folder)


def route(decided: Plan) -> Any:
    """The module that makes graphs for the target's runtime."""
    kind = "executorch" if decided.target.delegate else "onnx"
    return importlib.import_module(f"potexport.route_{kind}")


def load(decided: Plan) -> tuple[PreTrainedModel, Any]:
    """The model, untouched, in the build's float type, and its tokenizer."""
    import torch

    tokenizer = loader.load_tokenizer(decided.source)
    loader.tokenizer_matches(tokenizer, decided.config)
    model = adapters.load_model(
        decided.source,
        decided.adapters,
        dtype=getattr(torch, decided.traced.dtype),
        attn_implementation="eager",  # every model has it; ours takes its place
        trust_remote_code=decided.options.trust_remote_code,
        config=decided.config,
    )
    return model, tokenizer


def _manifest(decided: Plan, ends: tuple[int, ...], made: dict[str, Any]) -> Manifest:
    """made: the fields that the route fills."""
    return Manifest(
        model=decided.layout.facts,
        pot=decided.layout.pot,
        policies=tuple(facts for facts, _ in decided.policies),
        precision=decided.precision,
        target=decided.target.name,
        runtime=decided.target.runtime,
        catalyst=decided.catalyst,
        source=" + ".join(each.name for each in (decided.source, *decided.adapters)),
        eos_token_ids=ends,
        graphs=decided.layout.graphs(),
        pot_dtype=decided.layout.pot_dtype,
        in_place=decided.layout.in_place,
        tools={
            "potexport": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in (*TOOLS, *route(decided).tools(decided))},
        },
        **made,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
