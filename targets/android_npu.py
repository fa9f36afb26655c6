"""The NPU (Hexagon HTP) of Android phones with a Snapdragon, through ONNX Runtime and QNN.

Compiled ahead of time for one chip. fp16 is what the HTP computes in, whatever a graph says.
"""

from potexport.targets import Target
from potexport.targets._qualcomm import Soc

TARGET = Target(
    name="android-npu",
    summary="Snapdragon phones, on the Hexagon NPU, by ONNX Runtime QNN",
    runtime="onnxruntime-qnn",
    precisions=("fp16",),
    default_precision="fp16",
    proven="executed here",  # on Qualcomm's x86 emulator of the HTP; never on a phone
)
SOCS = (
    Soc("sm8550", "Snapdragon 8 Gen 2", 73, 43),
    Soc("sm8650", "Snapdragon 8 Gen 3", 75, 57),
    Soc("sm8750", "Snapdragon 8 Elite", 79, 69),
    Soc("sm8850", "Snapdragon 8 Elite Gen 5", 81, 87),
)
