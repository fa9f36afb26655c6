"""The NPU (Hexagon HTP) of Android phones with a Snapdragon, through ExecuTorch and QNN.

ExecuTorch is built for one version of Qualcomm's SDK, which is not on PyPI. The libraries in the
wheel onnxruntime-qnn are of another, and refuse (error 14001): they are never used here.
"""

import os
from pathlib import Path
from typing import Any

from potexport.targets import Delegate, Soc, Target, android_npu

VERSION = "2.37"  # what ExecuTorch 1.5 is built for
LIBRARY = Path("lib", "x86_64-linux-clang", "libQnnHtp.so")


def partitioners(soc: Soc | None) -> list[Any]:
    """QNN's partitioner for the model graphs, in fp16, for one chip."""
    assert soc is not None
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
    )

    return [
        QnnPartitioner(
            generate_qnn_executorch_compiler_spec(
                soc_model=QcomChipset(soc.soc_model),
                backend_options=generate_htp_compiler_spec(use_fp16=True),
            )
        )
    ]


def lacks() -> str | None:
    root = os.environ.get("QNN_SDK_ROOT")
    if root and (Path(root) / LIBRARY).is_file():
        return None
    found = f"{root!r} has no {LIBRARY}" if root else "it is not set"
    return (
        f"Qualcomm's QAIRT SDK {VERSION}, its folder in the environment variable QNN_SDK_ROOT "
        f"({found}); without it, build with --runtime onnxruntime"
    )


TARGET = Target(
    name="android-npu",
    summary="Snapdragon phones, on the Hexagon NPU, by ExecuTorch and QNN",
    runtime="executorch",
    precisions={"fp16": "float16"},
    default_precision="fp16",
    proven="not here",
    note="never lowered: it needs Qualcomm's QAIRT 2.37, which is not on PyPI",
    slots=android_npu.TARGET.slots,
    chunk=android_npu.TARGET.chunk,
    package="executorch",
    extra="executorch",
    socs=android_npu.TARGET.socs,
    delegate=Delegate("QnnBackend", partitioners, lacks=lacks),
)
