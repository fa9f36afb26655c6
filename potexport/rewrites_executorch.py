"""What a delegate takes only in another form: rewrites of a decomposed program, by name.

A delegate lists those that it needs (`targets.Delegate.rewrites`). Each keeps every value, to the
rounding of a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

aten = torch.ops.aten
OF_BOOLS = {
    aten.logical_or.default: aten.bitwise_or.Tensor,
    aten.logical_and.default: aten.bitwise_and.Tensor,
}


def mean_as_product(program: ExportedProgram) -> int:
    """Write means over the last dimension as a product with a column of 1/n; returns how many.

    XNNPACK takes no mean but that of a picture, and every RMSNorm has one: each would end a
    delegate and begin the next.
    """
    graph = program.graph
    columns: dict[int, fx.Node] = {}
    found = [node for node in graph.nodes if _is_mean(node)]
    for node in found:
        size = int(node.args[0].meta["val"].shape[-1])
        if size not in columns:
            weight = torch.full((1, size), 1.0 / size, dtype=_value(node).dtype)
            columns[size] = _constant(program, f"mean_of_{size}", weight)
        with graph.inserting_before(node):
            product = graph.call_function(aten.linear.default, (node.args[0], columns[size]))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return len(found)


def compute_constants(program: ExportedProgram) -> int:
    """Compute what depends on no input and no weight, such as the numbers of the slots; returns how
    many tensors are constants now.

    Left in, it may become a piece of its own without any input, which Vulkan's passes do not
    stand.
    """
    graph, lifted = program.graph, program.graph_signature.inputs_to_lifted_tensor_constants
    known: dict[fx.Node, torch.Tensor] = {}
    for node in graph.nodes:
        if node.name in lifted:
            known[node] = program.constants[lifted[node.name]]
        elif node.op == "call_function" and all(each in known for each in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    needed = [
        node
        for node in known
        if node.op == "call_function" and any(user not in known for user in node.users)
    ]
    for node in needed:
        constant = _constant(program, f"constant_{node.name}", known[node].contiguous().clone())
        node.replace_all_uses_with(constant)
    return len(needed)


def logic_as_bits(program: ExportedProgram) -> int:
    """Write `and` and `or` of truth values as those of their bits; returns how many.

    OpenVINO's partitioner knows only these.
    """
    found = [
        node
        for node in program.graph.nodes
        if node.target in OF_BOOLS
        and all(_value(each).dtype == torch.bool for each in node.all_input_nodes)
    ]
    for node in found:
        node.target = OF_BOOLS[node.target]
    return len(found)


def codes_as_quantized(program: ExportedProgram) -> int:
    """Write casts of int8 codes as the dequantization with a scale of 1; returns how many.

    XNNPACK takes only this, and then the codes of one layer become floats when their turn comes.
    Left outside, all would be floats before it begins: a pot as large as one of floats.
    """
    import executorch.kernels.quantized  # noqa: F401 - the operator

    found = [
        node
        for node in program.graph.nodes
        if node.target in (aten._to_copy.default, aten.to.dtype)
        and _value(node.args[0]).dtype == torch.int8
        and _value(node).dtype == torch.float32
    ]
    for node in found:
        node.target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        node.args, node.kwargs = (node.args[0], 1.0, 0, -128, 127, torch.int8), {}
    return len(found)


REWRITES: dict[str, Callable[[ExportedProgram], int]] = {
    "mean": mean_as_product,
    "constants": compute_constants,
    "bits": logic_as_bits,
    "codes": codes_as_quantized,
}


def _constant(program: ExportedProgram, name: str, value: torch.Tensor) -> fx.Node:
    from executorch.backends.transforms.utils import create_constant_placeholder

    graph = program.graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(first):
        made: fx.Node = create_constant_placeholder(
            program, graph, name, InputKind.BUFFER, value, True
        )
    return made


def _is_mean(node: fx.Node) -> bool:
    if node.target is not aten.mean.dim or len(node.args) < 3 or node.args[2] is not True:
        return False
    source, dims = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    last = _value(source).dim() - 1
    return isinstance(dims, (list, tuple)) and list(dims) in ([-1], [last])


def _value(node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value
