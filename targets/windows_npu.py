"""The NPU (Hexagon HTP) of Windows laptops with a Snapdragon X, through ONNX Runtime and QNN."""

from potexport.targets import Target
from potexport.targets._qualcomm import Soc

TARGET = Target(
    name="windows-npu",
    summary="Snapdragon X laptops, on the Hexagon NPU, by ONNX Runtime QNN",
    runtime="onnxruntime-qnn",
    precisions=("fp16",),
    default_precision="fp16",
    proven="executed here",  # on Qualcomm's x86 emulator of the HTP; never on a laptop
)
SOCS = (Soc("sc8380xp", "Snapdragon X Elite and Plus", 73, 60),)
