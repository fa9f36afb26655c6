"""Traced programs to one ExecuTorch program, by whatever delegate a target names.

Most of the time went into work done several times over: a delegate's front end decomposes a
program up to four times, each a new trace of every layer, and copies what a node remembers of its
Python source at every pass. Here a program is decomposed once and forgets its source first.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from potexport.bundle import Delegation
from potexport.errors import PotexportError
from potexport.rewrites_executorch import REWRITES
from potexport.runtime.executorch_options import compute_in_fp32
from potexport.runtime.quiet import quietly
from potexport.targets import Delegate, Soc, Target
from potexport.weights_executorch import weights_once

aten = torch.ops.aten
PACKAGES = ("executorch", "torchao", "flatbuffers")
FIND_NOTHING = (
    "NormalizeTransposePass",
    "ReplaceBrokenOpsWithFunctionalOpsPass",
    "SymToTensorPass",
)
NOTHING_DONE = (aten.to.dtype, aten._to_copy.default, aten.alias.default)


def require(target: Target) -> None:
    """PotexportError where ExecuTorch, or what its delegate needs, is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PotexportError(
            f"building for ExecuTorch needs {', '.join(missing)}; install with: pip install "
            "'potexport[export,executorch]'"
        )
    lacking = target.delegate and target.delegate.lacks()
    if lacking:
        raise PotexportError(f"target {target.name} of {target.runtime} needs {lacking}")


def lower(
    programs: Mapping[str, ExportedProgram],
    target: Target,
    constants: Mapping[str, Any],
    path: Path,
    *,
    soc: Soc | None = None,
) -> dict[str, Delegation]:
    """Lower the programs and write them, with their constant methods, as one `.pte`.

    Takes over the programs. Returns what the delegate took of each. soc: the chip, if the target
    has any.
    Raises PotexportError, in one line, where the delegate's compiler refuses.
    """
    assert target.delegate is not None
    compute_in_fp32(target.delegate.name)  # a compiler loads what later runs in the same process
    with quietly(), _silently(), no_collections():
        import executorch.kernels.quantized  # noqa: F401 - quantized embeddings
        from executorch.exir import (
            EdgeCompileConfig,
            ExecutorchBackendConfig,
            to_edge_transform_and_lower,
        )
        from executorch.exir.passes import MemoryPlanningPass

        delegate = target.delegate
        partitioners = {
            name: delegate.partitioners(soc)
            if not name.startswith("compress") or delegate.compresses
            else []
            for name in programs
        }
        ready = {
            name: prepare(program, delegate, partitioners[name])
            for name, program in programs.items()
        }
        counted = {name: _operators(program.graph) for name, program in ready.items()}
        options = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        # Inputs and outputs are arrays of the host: the pot must not be copied into the program's
        # own memory at each step.
        plan = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        with _refused_by(delegate), weights_once():
            with _fewer_passes():
                edge = to_edge_transform_and_lower(
                    ready,
                    partitioner=partitioners,
                    constant_methods=dict(constants),
                    compile_config=options,
                )
            shares = {name: _share(edge.exported_program(name), counted[name]) for name in ready}
            edge.compile_config = options  # lost on the way; one more pass would run without
            lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=plan))
        with path.open("wb") as file:
            lowered.write_to_file(file)
    return shares


@contextmanager
def _refused_by(delegate: Delegate) -> Iterator[None]:
    """One line for whatever a delegate's compiler fails with; each fails in its own way."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (str(first).strip() or type(first).__name__).splitlines()[0][:200]
        raise PotexportError(
            f"{delegate.name} does not take these graphs ({reason}); choose another --target, or "
            "report it"
        ) from error


def prepare(
    program: ExportedProgram, delegate: Delegate, partitioners: list[Any]
) -> ExportedProgram:
    """Decompose once, down to what the delegate wants to see, and rewrite what it does not take."""
    from executorch.exir.program._program import _default_decomposition_table

    _forget_source(program)
    _simplify(program)
    table = _default_decomposition_table()
    for partitioner in partitioners:
        for operator in partitioner.ops_to_not_decompose(program)[0]:
            table.pop(operator, None)
    program = program.run_decompositions(table)
    _forget_source(program)
    merge_equal(program)
    if partitioners:
        for name in delegate.rewrites:
            REWRITES[name](program)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    # The front end asks for it again, with nothing left to decompose.
    program.run_decompositions = lambda *_args, **_kwargs: program
    return program


def _forget_source(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")}


def _simplify(program: ExportedProgram) -> None:
    """Take out assertions and casts to the same type; products of three dimensions are `bmm`."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in NOTHING_DONE and _type(node) == _type(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.matmul.default and all(
            each.meta["val"].dim() == 3 for each in node.args
        ):
            node.target = aten.bmm.default  # matmul would be decomposed into copies and this
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def merge_equal(program: ExportedProgram) -> int:
    """Compute once what is computed twice; returns how many operators went.

    Each layer prepares cos and sin anew. Not so the quantization of an input that several products
    share: XNNPACK takes each product with its own, and came in five pieces without.
    """
    graph, first = program.graph, dict[str, fx.Node]()
    gone = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") == "torchao":
            continue
        # Nodes print as their names, which are unique.
        key = f"{node.target} {node.args} {node.kwargs}"
        twin = first.setdefault(key, node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
            gone += 1
    program.graph_module.recompile()
    return gone


def _type(node: fx.Node) -> torch.dtype:
    value: torch.Tensor = node.meta["val"]
    return value.dtype


def _operators(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" and not _is_getitem(node) for node in graph.nodes)


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _share(program: ExportedProgram, before: int) -> Delegation:
    """A lowered graph: what is left of its operators, and calls of delegates in place of others."""
    calls = [
        node
        for node in program.graph.nodes
        if getattr(node.target, "__name__", "") == "executorch_call_delegate"
    ]
    left = _operators(program.graph) - len(calls)
    return Delegation(max(before - left, 0), before, len(calls))


@contextmanager
def _fewer_passes() -> Iterator[None]:
    """Leave out the passes of its front end that find nothing in a decomposed graph of constant
    shapes; each traces every layer anew to find that out."""
    from executorch.exir import passes

    every: list[Any] = passes.base_pre_op_replace_passes
    before = list(every)
    every[:] = [each for each in before if type(each).__name__ not in FIND_NOTHING]
    try:
        yield
    finally:
        every[:] = before


@contextmanager
def _silently() -> Iterator[None]:
    """Nothing on standard output, and none of tqdm's bars: compilers tell every operator there."""
    import tqdm

    kind, before = tqdm.std.tqdm, tqdm.std.tqdm.__init__
    kind.__init__ = functools.partialmethod(before, disable=True)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        kind.__init__ = before


@contextmanager
def no_collections() -> Iterator[None]:
    """Passes make millions of objects and hardly a cycle: looking for some takes a fifth longer."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
