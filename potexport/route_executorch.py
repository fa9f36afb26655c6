"""Graphs for ExecuTorch: one program of four methods that share their weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potexport.bundle import Program
from potexport.facts import end_tokens, weights_sha256
from potexport.plan import Plan
from potexport.refusing import refusing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stage = Callable[[str], None]


def tools(decided: Plan) -> tuple[str, ...]:
    """The packages whose versions a bundle names, besides those of every route."""
    return ("executorch", "torchao")


def write(
    decided: Plan, model: PreTrainedModel, tokenizer: Any, folder: Path, stage: Stage
) -> dict[str, Any]:
    """Write the program into the bundle, and read it back; what the manifest says of it. Takes over
    `model`."""
    from potexport import lower_executorch, programs, quantize_torchao, store_executorch
    from potexport.compressions import compressions
    from potexport.graphs.model import PotModel

    layout, delegate = decided.layout, decided.target.delegate
    assert delegate is not None
    source = weights_sha256(model)
    with refusing(layout.facts):
        core = PotModel(model, layout.facts, layout.pot)
        squeezing = compressions(decided, core, tokenizer, folder, stage)
        if decided.precision == "w4":
            stage("quantize")
            quantize_torchao.w4(model)
        traced = {}
        for name, spec in layout.graphs().items():
            stage(name)
            with lower_executorch.no_collections():
                traced[name] = programs.trace(squeezing.get(name, core), spec)
    stage("lower")
    path = folder / store_executorch.PROGRAM
    shares = lower_executorch.lower(
        traced,
        decided.target,
        constants(decided, model, tokenizer),
        path,
        soc=decided.socs[0] if decided.socs else None,
    )
    del core, squeezing
    traced.clear()
    gc.collect()  # programs refer to themselves, and hold what a delegate made of the weights
    stage("share")
    saved = store_executorch.share_bytes(path)
    stage("check")
    store_executorch.check(path, layout.graphs())
    program = Program(delegate.name, shares, source, saved)
    return {"weights": store_executorch.PROGRAM, "program": program}


def constants(decided: Plan, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """What the program tells ExecuTorch's own tools, as methods without inputs.

    The first names are those of ExecuTorch's language-model runner (`extension/llm/runner`); the
    pot's are ours.
    """
    facts, pot = decided.layout.facts, decided.layout.pot
    known: dict[str, Any] = {
        "get_max_seq_len": pot.chunk,  # tokens of one call
        "get_max_context_len": pot.slots,  # tokens it can look back on
        "get_vocab_size": facts.vocab_size,
        "get_eos_ids": list(end_tokens(model.generation_config)),
        "use_kv_cache": True,
        "enable_dynamic_shape": False,
        "get_n_layers": facts.layers,
        "get_pot_slots": pot.slots,
        "get_pot_chunk": pot.chunk,
        "get_pot_keep": pot.keep,
        "get_pot_keep_max": pot.keep_max,
        "get_pot_catalyst_width": pot.catalyst_width,
        "get_pot_sink": pot.sink,
        "get_pot_recent": pot.recent,
        "get_pot_positions": pot.positions,
    }
    if tokenizer.bos_token_id is not None:
        known["get_bos_id"] = tokenizer.bos_token_id
    return known
