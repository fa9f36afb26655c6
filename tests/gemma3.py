"""Where the second real model is, for the tests that need it: windows, and two rotary bases."""

from __future__ import annotations

import pytest

from tests.smollm2 import CACHE

GGUF = CACHE / "gemma-3-270m-q4_k_m.gguf"
present = pytest.mark.skipif(not GGUF.exists(), reason="no Gemma 3 here; `make gemma` fetches it")
needed = [pytest.mark.slow, present]
