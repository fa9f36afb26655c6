"""iPhones and iPads of iOS 18 or later, through ExecuTorch and Core ML.

Core ML takes the three model graphs whole and computes them in fp16, on the Neural Engine, the GPU
or the CPU as it decides. The compression stays with ExecuTorch's own kernels: it compares numbers
of slots and near-equal scores, which fp16 would round.
"""

import importlib.util
from typing import Any

from potexport.targets import Delegate, Soc, Target


def partitioners(soc: Soc | None) -> list[Any]:
    """Core ML's partitioner for the model graphs."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
    )
    return [CoreMLPartitioner(compile_specs=specs)]


def lacks() -> str | None:
    if importlib.util.find_spec("coremltools") is None:
        return "the package coremltools, which executorch installs on Linux and macOS only"
    return None


TARGET = Target(
    name="ios",
    summary="iPhones and iPads, by ExecuTorch and Core ML",
    runtime="executorch",
    precisions={"fp16": "float16"},
    default_precision="fp16",
    proven="compiled here",
    note="by coremltools, for iOS 18; never on a device",
    package="coremltools",
    extra="executorch",
    delegate=Delegate("CoreMLBackend", partitioners, lacks=lacks),
)
