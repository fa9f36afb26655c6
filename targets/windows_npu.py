"""The NPU (Hexagon HTP) of Windows laptops with a Snapdragon X, through ONNX Runtime and QNN."""

from dataclasses import replace

from potexport.targets import Soc, android_npu

TARGET = replace(
    android_npu.TARGET,
    name="windows-npu",
    summary="Snapdragon X laptops, on the Hexagon NPU, by ONNX Runtime QNN",
    note="on Qualcomm's x86 emulator of the HTP, never on a laptop",
    socs=(Soc("sc8380xp", "Snapdragon X Elite and Plus", 73, 60),),
)
