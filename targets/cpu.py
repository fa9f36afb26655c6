"""Any CPU, through ONNX Runtime."""

from potexport.targets import Target

TARGET = Target(
    name="cpu",
    summary="any CPU, by ONNX Runtime",
    runtime="onnxruntime",
    precisions={
        "fp32": "float32",
        "fp16": "float16",
        "a16w8": "uint16",
        "w4": "float32",
        "w8": "float32",
        "w4-w8": "float32",
    },
    default_precision="fp32",
    proven="executed here",
    note="x86-64 Linux",
    in_place=True,
)
