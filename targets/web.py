"""Browsers, through onnxruntime-web.

Its JavaScript interface copies every tensor in and out, so the pot is not written in place. In
WebAssembly its products of 4-bit and 8-bit blocks take over three times as long as those of floats
(docs/web.md), so there is one precision.
"""

from potexport.targets import Target

TARGET = Target(
    name="web",
    summary="browsers, by onnxruntime-web: WebAssembly",
    runtime="onnxruntime",
    precisions={"fp32": "float32"},
    default_precision="fp32",
    proven="executed here",
    note="in headless Chromium on x86-64 Linux; never by WebNN",
    fused=True,
)
