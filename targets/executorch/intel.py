"""Intel's CPUs, through ExecuTorch and OpenVINO.

OpenVINO takes the three model graphs whole. A program does not say how exactly it is to be
computed, and OpenVINO rounds to bfloat16 wherever a CPU has instructions for it: our runtime
forbids that (`runtime.executorch_options`), an app of one's own has to.
"""

import importlib
import importlib.util
import sys
from typing import Any

from potexport.targets import Delegate, Soc, Target

PACKAGE = "executorch.backends.openvino"


def partitioners(soc: Soc | None) -> list[Any]:
    """OpenVINO's partitioner for the model graphs; ExecuTorch's own kernels compress."""
    from executorch.exir.backend.backend_details import CompileSpec

    return [_partitioner().OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


def _partitioner() -> Any:
    """The module of that name, without its package's `__init__`: that imports a quantizer as well,
    which wants an nncf that fits neither this openvino nor this torch."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    before = sys.modules.get(PACKAGE)
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{PACKAGE}.partitioner")
    finally:
        del sys.modules[PACKAGE]
        if before is not None:
            sys.modules[PACKAGE] = before


def lacks() -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino; install it with: pip install 'potexport[openvino]'"
    return None


TARGET = Target(
    name="intel",
    summary="Intel's CPUs, by ExecuTorch and OpenVINO",
    runtime="executorch",
    precisions={"fp32": "float32"},
    default_precision="fp32",
    proven="executed here",
    note="x86-64 Linux, the CPU; never Intel's GPU or NPU",
    package="openvino",
    extra="openvino",
    delegate=Delegate("OpenvinoBackend", partitioners, rewrites=("bits",), lacks=lacks),
)
