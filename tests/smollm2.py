"""Where the real model is, for the tests that need it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("POTEXPORT_CACHE") or ROOT / ".cache")
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
# `make test` fetches it first, so that these tests run there.
present = pytest.mark.skipif(not GGUF.exists(), reason="no SmolLM2 here; `make model` fetches it")
needed = [pytest.mark.slow, present]
