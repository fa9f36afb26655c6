"""PyTorch modules to ONNX models in memory, with the contract's names.

The three model graphs come from one trace with a symbolic width (`superset`); `lower_onnx` cuts and
fixes it. The compression graph is traced by itself. Nothing here touches the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import nn

from potexport.graphs.compress import Compress
from potexport.programs import Graph, example
from potexport.runtime.quiet import quietly
from potexport.spec import GraphSpec, Layout

if TYPE_CHECKING:
    from potexport.graphs.model import PotModel


def superset(core: PotModel, layout: Layout, *, opset: int) -> ir.Model:
    """The model with every input and output of prefill, decode and observe; the width is
    symbolic."""
    from potexport.graphs.model import Superset

    width = torch.export.Dim("width", min=1, max=1 << 20)
    tokens = layout.pot.chunk + 1  # any width but 1, which would be taken for a constant
    pot = [example(spec) for spec in layout.past()]
    # Two tensors, not one twice: the tracer would take them for the same input.
    ids, next_ids = (torch.zeros(1, tokens, dtype=torch.int32) for _ in range(2))
    fill, position = (torch.zeros(n, dtype=torch.int32) for n in (layout.counts, 1))
    coded = [example(spec) for spec in layout.codes()]
    stood = layout.positions() if coded else ()
    lists = (pot, coded, [example(spec) for spec in stood])
    args = (ids, next_ids, torch.zeros(tokens), fill, position, *lists)
    dims = ({1: width}, {1: width}, {0: width}, None, None, *([None] * len(x) for x in lists))
    model = _translate(Superset(core, in_place=layout.in_place), args, opset=opset, dims=dims)
    outputs = ["logits", "novelty"]
    outputs += [f"{name}.{n}" for name in ("mass", "new_mass") for n in layout.chosen]
    outputs += [spec.name for spec in layout.rows("present", 1)]
    inputs = [
        "input_ids",
        "next_ids",
        "query_weights",
        "past_seq_len",
        "position",
        *(spec.name for spec in (*layout.past(), *layout.codes(), *stood)),
    ]
    return _rename(model, inputs, outputs)


def compress(core: Compress, spec: GraphSpec, *, opset: int) -> ir.Model:
    """A compression graph."""
    graph = Graph.compression(core, spec)
    model = _translate(graph, graph.example(), opset=opset, dims=None)
    return _rename(model, [t.name for t in spec.inputs], [t.name for t in spec.outputs])


def _translate(module: nn.Module, args: tuple[Any, ...], *, opset: int, dims: Any) -> ir.Model:
    with torch.no_grad(), quietly(), _without_stack_traces():
        program = torch.export.export(
            module,
            args,
            dynamic_shapes=dims,
            strict=False,
            # Guards such as "min(M + T, T*T + M*T) == M + T" hold for every width but are not
            # provable to sympy.
            prefer_deferred_runtime_asserts_over_guards=dims is not None,
        )
        exported = _to_onnx(program, opset)
    translated: ir.Model = exported.model
    return translated


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Each node has one otherwise, for which the tracer reads source files: a sixth of its time."""
    with mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True):
        yield


END = (1 << 63) - 1  # of a slice that has none
ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
)


def _to_onnx(program: torch.export.ExportedProgram, opset: int) -> Any:
    """Translate, first without decomposing: that traces everything anew, over half of the time."""
    options: dict[str, Any] = {
        "dynamo": True,
        "opset_version": opset,
        "optimize": False,
        "verbose": False,
        "custom_translation_table": {torch.ops.aten.slice.Tensor: _slice},
    }
    if _is_functional(program):
        program.run_decompositions = lambda *_args, **_kwargs: program
        try:
            with _known_values(program.graph):
                return torch.onnx.export(program, (), **options)
        except torch.onnx.errors.OnnxExporterError:
            del program.run_decompositions  # some operator is known only in parts: the long way
    return torch.onnx.export(program, (), **options)


@contextmanager
def _known_values(graph: torch.fx.Graph) -> Iterator[None]:
    """For its type promotions the exporter runs every node again, on tensors without storage. What
    comes out the trace knows; only nodes that were changed are run."""
    known = {
        node: (node.target, node.args, node.kwargs, node.meta["val"])
        for node in graph.nodes
        if node.op == "call_function" and "val" in node.meta
    }
    run = torch.fx.Interpreter.run_node

    def run_node(self: torch.fx.Interpreter, node: torch.fx.Node) -> Any:
        *before, value = known.get(node, (None,))
        same = before == [node.target, node.args, node.kwargs]
        return value if same else run(self, node)

    with mock.patch.object(torch.fx.Interpreter, "run_node", run_node):
        yield


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """As the exporter writes it, with nothing left to fold where bounds are constant: its own
    takes thirteen nodes."""

    def constant(number: int) -> Any:
        return op.Constant(value_ints=[number])

    def bound(given: Any, otherwise: int) -> Any:
        if given is None or isinstance(given, int):
            return constant(otherwise if given is None else given)
        return op.Reshape(given, constant(-1))

    return op.Slice(x, bound(start, 0), bound(end, END), constant(dim), constant(step))


def _is_functional(program: torch.export.ExportedProgram) -> bool:
    """Clean a traced program in place; True if no operator left writes into its arguments."""
    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target is aten.to.dtype:  # the exporter knows it as _to_copy only
            source, dtype = node.args[:2]
            node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
    graph.eliminate_dead_code()
    operators = {node.target for node in graph.nodes}
    known = [each for each in operators if isinstance(each, torch._ops.OpOverload)]
    return not any(operator._schema.is_mutable for operator in known)


def _rename(model: ir.Model, inputs: list[str], outputs: list[str]) -> ir.Model:
    """Give the graph's inputs, outputs and weights the names of the contract and of the
    checkpoint."""
    graph = model.graph
    if (len(graph.inputs), len(graph.outputs)) != (len(inputs), len(outputs)):
        raise RuntimeError(
            f"the exporter made {len(graph.inputs)} inputs and {len(graph.outputs)} outputs where "
            f"{len(inputs)} and "
            f"{len(outputs)} were traced"
        )
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    for old in list(graph.initializers):
        value = graph.initializers[old]
        value.name = old.removeprefix("core.").removeprefix("model.")
    return model
