"""Where the real model is, for the tests that need it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("POTEXPORT_CACHE") or ROOT / ".cache")
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
# `make test` fetches it first, so that these tests run there.
present = pytest.mark.skipif(not GGUF.exists(), reason="no SmolLM2 here; `make model` fetches it")
needed = [pytest.mark.slow, present]


def cut(folder: Path, layers: int) -> Path:
    """A Hugging Face folder with its first layers, at their full width."""
    import torch

    from potexport import loader

    source = loader.resolve(str(GGUF))
    model: Any = loader.load_model(source, dtype=torch.float32, attn_implementation="sdpa")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.quantization_config = None
    model.save_pretrained(folder)
    loader.save_tokenizer(loader.load_tokenizer(source), folder)
    return folder
