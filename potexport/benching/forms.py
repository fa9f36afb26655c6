"""The same weights in the forms that peers take: the GGUF itself, and a Hugging Face folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from potexport import loader
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts


class Forms:
    """A model, and what was made of it in the cache folder."""

    def __init__(self, model: str, cache: Path, facts: ModelFacts) -> None:
        """model: a folder, a .gguf file or a hub id. facts: of it, as its bundles have them."""
        self.source, self.facts = loader.resolve(model), facts
        self.cache = cache / f"{self.source.name.replace('/', '--')}-{self._digest()}"

    def _digest(self) -> str:
        """Tells models of one name apart, and a file from what it was before it was changed."""
        place = Path(self.source.location)
        files = [place] if self.source.kind == "gguf" else sorted(place.glob("*"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((self.source, stats)).encode()).hexdigest()[:12]

    @property
    def gguf(self) -> Path:
        if self.source.kind != "gguf":
            raise PotexportError(
                f"llama.cpp reads .gguf files, and {self.source} is none; give --model such a file"
            )
        return Path(self.source.location)

    @cached_property
    def checkpoint(self) -> Path:
        """A Hugging Face folder: the model's own, or one with the GGUF's numbers in float32."""
        if self.source.kind == "folder":
            return Path(self.source.location)
        folder = self.cache / "checkpoint"
        if not (folder / "config.json").is_file():
            import torch

            model = loader.load_model(self.source, dtype=torch.float32, attn_implementation="sdpa")
            loader.save_checkpoint(model, loader.load_tokenizer(self.source), folder)
        return folder

    def cache_bytes(self, item: int) -> int:
        """Keys and values of one token, of so many bytes each."""
        return 2 * self.facts.layers * self.facts.kv_heads * self.facts.head_size * item

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of the checkpoint; a tied one stands there once."""
        from safetensors import safe_open

        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(self.checkpoint.glob("*.safetensors")):
            with safe_open(file, "numpy") as tensors:
                names = tensors.keys()
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        return found


def products(sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Floating-point operations for each token of a prompt: two for each weight of a matrix that
    is neither the embedding nor the head."""
    tables = ("embed", "lm_head", "token_embd", "output.weight")
    return 2 * sum(
        math.prod(size)
        for name, size in sizes.items()
        if len(size) == 2 and not any(each in name for each in tables)
    )
