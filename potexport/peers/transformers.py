"""transformers on PyTorch, in float32, with its whole cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potexport.benching.forms import Forms, products
from potexport.peers import Prepared, Reader
from potexport.runtime.ids import Ids

PIECE = 1024  # tokens of one pass: its mask has a number for each pair of tokens
FP32 = 4  # bytes


@dataclass(frozen=True)
class Transformers:
    package: str = "transformers"
    module: str = "transformers"

    def prepare(self, forms: Forms, *, context: int) -> Prepared:
        sizes, table = forms.sizes(), "model.embed_tokens.weight"
        tied = "lm_head.weight" not in sizes
        read = {name: size for name, size in sizes.items() if tied or name != table}
        return Prepared(
            path=forms.checkpoint,
            precision="fp32",
            weights=FP32 * sum(map(math.prod, read.values())),
            size=sum(file.stat().st_size for file in forms.checkpoint.glob("*.safetensors")),
            cache=forms.cache_bytes(FP32),
            work=products(sizes),
            copies=2,  # it grows by being copied
        )

    def open(self, prepared: Prepared, *, threads: int, context: int) -> Reader:
        return _Reader(prepared.path, threads)


class _Reader:
    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        own: Any = logging
        own.disable_progress_bar()
        torch.set_num_threads(threads)
        auto: Any = AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self._last: Any = None
        self._marked = 0
        self.reset()

    def read(self, ids: Ids) -> None:
        import torch

        for first in range(0, ids.size, PIECE):
            piece = torch.from_numpy(ids[None, first : first + PIECE].astype(np.int64))
            with torch.inference_mode():
                self._last = self._model(
                    piece, cache=self._cache, use_cache=True, logits_to_keep=1
                ).logits

    def following(self) -> int:
        return int(self._last[0, -1].argmax())

    def step(self, token: int) -> int:
        self.read(np.array([token], np.int32))
        return self.following()

    def mark(self) -> None:
        self._marked = self._cache.get_seq_length()

    def back(self) -> None:
        more = self._cache.get_seq_length() - self._marked
        if more:
            self._cache.crop(-more)  # so many of the last ones go

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache: Any = DynamicCache(config=self._model.config)


PEER = Transformers()
