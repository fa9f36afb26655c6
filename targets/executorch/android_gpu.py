"""The GPU of Android phones, through ExecuTorch and Vulkan.

Vulkan takes the three model graphs whole. The compression, integers and comparisons, stays with
ExecuTorch's own kernels. What is compiled here is its serialized graph; shaders are the device's.
"""

from typing import Any

from potexport.targets import Delegate, Soc, Target


def partitioners(soc: Soc | None) -> list[Any]:
    """Vulkan's partitioner for the model graphs."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


TARGET = Target(
    name="android-gpu",
    summary="GPUs of Android phones, by ExecuTorch and Vulkan",
    runtime="executorch",
    precisions={"fp16": "float16", "fp32": "float32"},
    default_precision="fp16",
    proven="compiled here",
    note="written for Vulkan; its shaders never ran, on no device",
    package="executorch",
    extra="executorch",
    delegate=Delegate("VulkanBackend", partitioners, rewrites=("constants",)),
)
