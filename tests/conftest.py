"""Threads: set before torch is imported. Tiny models are slower with two, and torch's idle threads
would spin beside ONNX Runtime's."""

import importlib
import importlib.util
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before anything loads Qualcomm's libQnnHtp: the other order crashes the process.
if importlib.util.find_spec("executorch") is not None:
    importlib.import_module("potexport.runtime.executorch_backend").binding()
