"""The NPU (Hexagon HTP) of Android phones with a Snapdragon, through ONNX Runtime and QNN.

Compiled ahead of time for a chip. fp16 is what the HTP computes in, whatever a float graph says. An
HTP computes all slots of a pot at every token, filled or not, so its default pot is smaller.
"""

from potexport.targets import Soc, Target

TARGET = Target(
    name="android-npu",
    summary="Snapdragon phones, on the Hexagon NPU, by ONNX Runtime QNN",
    runtime="onnxruntime-qnn",
    precisions={"fp16": "float16", "a16w8": "uint16", "w4": "float16"},
    default_precision="fp16",
    proven="executed here",
    note="on Qualcomm's x86 emulator of the HTP, never on a phone",
    slots=512,
    chunk=32,
    lowest_opset=23,
    compiler="npu",
    package="onnxruntime_qnn",
    extra="qnn",
    socs=(
        Soc("sm8550", "Snapdragon 8 Gen 2", 73, 43),
        Soc("sm8650", "Snapdragon 8 Gen 3", 75, 57),
        Soc("sm8750", "Snapdragon 8 Elite", 79, 69),
        Soc("sm8850", "Snapdragon 8 Elite Gen 5", 81, 87),
    ),
)
