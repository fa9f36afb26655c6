"""What delegates have to be told before a program is loaded, and cannot be through Python.

XNNPACK packs each method's weights into a copy of its own: three methods of SmolLM2 in fp32 take
1.6 GB where one copy is 0.5. Its weight cache shares them, and is off unless asked for. ExecuTorch
1.5 has no Python call for such options, so its C++ function is called with a structure laid out as
its header `runtime/backend/options.h` declares it. Where that is not possible, all works the same
and takes more memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from pathlib import Path

# executorch::runtime::set_option(char const*, Span<BackendOption>)
SYMBOL = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
OPTION = b"weight_cache_enabled"
OF_BOOL = 0  # the alternative of std::variant<bool, int, std::array<char, 256>>

# The variable of oneDNN, OpenVINO's kernels, and the newest of its instruction sets that has none
# for bfloat16.
INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")


def compute_in_fp32(delegate: str) -> None:
    """Keep OpenVINO from rounding to bfloat16, which it does where a CPU has instructions for it.

    Asked when it compiles, it computes in fp32; but a program does not store that, and ExecuTorch
    1.5 passes nothing on when it loads one. Whoever sets the variable is obeyed; once OpenVINO
    is loaded, it is too late.
    """
    if delegate == "OpenvinoBackend":
        os.environ.setdefault(*INSTRUCTIONS)


class _Option(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_char * 64),
        ("value", ctypes.c_ubyte * 256),
        ("alternative", ctypes.c_ubyte),
        ("padding", ctypes.c_ubyte * 3),
    )


class _Span(ctypes.Structure):
    _fields_ = (("data", ctypes.POINTER(_Option)), ("size", ctypes.c_size_t))


def share_packed_weights(delegate: str) -> bool:
    """Turn the cache on for programs loaded from now on; False where there is none to turn on."""
    if delegate != "XnnpackBackend":
        return False
    spec = importlib.util.find_spec("executorch")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for place in places:
        for path in Path(place, "lib").glob("libexecutorch.*"):
            try:
                set_option = ctypes.CDLL(str(path))[SYMBOL]
            except (OSError, AttributeError):
                continue
            set_option.argtypes = (ctypes.c_char_p, _Span)
            set_option.restype = ctypes.c_uint32
            option = _Option(key=OPTION, alternative=OF_BOOL)
            option.value[0] = 1
            error: int = set_option(delegate.encode(), _Span(ctypes.pointer(option), 1))
            if not error:
                return True
    logging.getLogger(__name__).info("no weight cache: each method packs its own weights")
    return False
