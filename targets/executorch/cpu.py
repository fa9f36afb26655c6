"""Any CPU, through ExecuTorch and XNNPACK.

XNNPACK takes the three model graphs whole. Of the compression, which is integers and comparisons,
it copies and turns the keys; ExecuTorch's own kernels do the rest.
"""

from typing import Any

from potexport.targets import Delegate, Soc, Target


def partitioners(soc: Soc | None) -> list[Any]:
    """XNNPACK's partitioner, with three differences.

    Views of the pot stay outside, where ExecuTorch makes them without a copy; XNNPACK would copy
    the whole pot at each token. So do concatenations of many layers, of which it takes five at
    most. And of XNNPACK's 17 passes over its part, each a trace of all layers, only the one runs
    that its graphs need.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        CatConfig,
        ViewCopyConfig,
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.backend_details import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    class Views(ViewCopyConfig):  # type: ignore[misc]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            taken: bool = super().check_constraints(node, ep)
            return taken and node.args[0].op != "placeholder"

    class FewParts(CatConfig):  # type: ignore[misc]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            taken: bool = super().check_constraints(node, ep)
            return taken and len(node.args[0]) <= 5

    own = {ViewCopyConfig: Views, CatConfig: FewParts}
    made = XnnpackPartitioner(configs=[own.get(kind, kind) for kind in ALL_PARTITIONER_CONFIGS])
    made.delegation_spec = DelegationSpec(
        "XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")]
    )
    return [made]


TARGET = Target(
    name="cpu",
    summary="any CPU, by ExecuTorch and XNNPACK",
    runtime="executorch",
    precisions={"fp32": "float32", "w4": "float32"},
    default_precision="fp32",
    proven="executed here",
    note="x86-64 Linux",
    package="executorch",
    extra="executorch",
    delegate=Delegate("XnnpackBackend", partitioners, compresses=True, rewrites=("mean", "codes")),
)
