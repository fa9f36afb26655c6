"""The same model in PyTorch with its whole cache: nothing dropped, nothing exported.

What a bundle is measured against, and who tells which tokens matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from potexport import adapters, loader, parity
from potexport.bundle import Manifest
from potexport.evaluation.ask import Answer
from potexport.evaluation.needles import Question
from potexport.runtime.backend import Array
from potexport.runtime.session import Ids

PIECE = 256  # tokens of one pass; it bounds the attention and the logits in memory


class Untouched:
    """One conversation; `ask`, `attention` and `generate` leave what was read as it was."""

    def __init__(self, model: PreTrainedModel, *, kv_heads: int) -> None:
        self._model, self._heads = model, kv_heads
        self._cache = DynamicCache()

    @classmethod
    def load(
        cls,
        folder: Path,
        manifest: Manifest,
        model: str,
        *,
        adapter: Sequence[str] = (),
        trust_remote_code: bool = False,
    ) -> Untouched:
        """In fp32, whatever the bundle's precision.

        Raises PotexportError for another model than the bundle's.
        """
        loaded = adapters.load_model(
            loader.resolve(model),
            adapters.find(adapter),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )
        parity.same_model(folder, manifest, loaded)
        return cls(loaded, kv_heads=manifest.model.kv_heads)

    @property
    def size(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    def read(self, ids: Ids) -> None:
        """Forget all, and read this."""
        self._cache = DynamicCache()
        for first in range(0, ids.size, PIECE):
            self._run(ids[first : first + PIECE], last=1)

    def ask(self, question: Question) -> Answer:
        size = self.size
        ids = np.concatenate([question.given, question.wanted[:-1]])
        logits = self._run(ids, last=question.wanted.size).logits[0].numpy()
        self._forget(size)
        return Answer.of(logits, question.wanted)

    def attention(self, ids: Ids) -> list[Array]:
        """L x (Hkv, n) float32: what the queries of `ids`, the last PIECE of them, pay to each of
        the n tokens read, summed over them and averaged over the query heads of a group."""
        size, ids = self.size, ids[-PIECE:]
        self._model.set_attn_implementation("eager")  # the only one that shows its attention
        try:
            found = self._run(ids, last=1, output_attentions=True).attentions
        finally:
            self._model.set_attn_implementation("sdpa")
        self._forget(size)
        return [
            paid[0, :, :, :size].sum(1).unflatten(0, (self._heads, -1)).mean(1).numpy()
            for paid in found
        ]

    def surprises(self, ids: Ids) -> Array:
        """(n - 1,) float32, nats of each token of `ids` but the first; forgets all first."""
        self._cache = DynamicCache()
        found = []
        for first in range(0, ids.size - 1, PIECE):
            piece = ids[first : first + PIECE]
            following = torch.from_numpy(ids[first + 1 : first + 1 + PIECE].astype(np.int64))
            likely = self._run(piece, last=piece.size).logits[0].log_softmax(-1)
            taken = likely[: following.numel()].gather(-1, following[:, None])
            found.append(-taken[:, 0].numpy())
        return np.concatenate(found)

    def generate(self, ids: Ids, *, most: int, ends: Sequence[int]) -> list[int]:
        """The likeliest tokens behind what was read and `ids`, without the token that ends them."""
        size, made = self.size, list[int]()
        logits = self._run(ids, last=1).logits
        while len(made) < most and (token := int(logits[0, -1].argmax())) not in ends:
            made.append(token)
            logits = self._run(np.array([token], np.int32), last=1).logits
        self._forget(size)
        return made

    @torch.no_grad()
    def _run(self, ids: Ids, *, last: int, **more: Any) -> Any:
        """One pass, appended to the cache; logits of the last tokens."""
        tokens = torch.from_numpy(np.asarray(ids, np.int64))[None]
        model = cast("Any", self._model)
        return model(tokens, cache=self._cache, use_cache=True, logits_to_keep=last, **more)

    def _forget(self, size: int) -> None:
        """All behind the first `size` tokens."""
        self._cache.crop(size - self.size)
