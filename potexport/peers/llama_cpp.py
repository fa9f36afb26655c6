"""llama.cpp by its Python binding, on the GGUF itself, with the binding's own defaults."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potexport.benching.forms import Forms, products
from potexport.peers import Prepared, Reader
from potexport.runtime.ids import Ids

SPARE = 256  # tokens beyond the context, for what is generated
FP16 = 2  # bytes of a number in its cache


@dataclass(frozen=True)
class LlamaCpp:
    package: str = "llama-cpp-python"
    module: str = "llama_cpp"

    def prepare(self, forms: Forms, *, context: int) -> Prepared:
        from gguf import GGUFReader

        reader = GGUFReader(forms.gguf)
        tensors = {each.name: each for each in reader.tensors}
        tied = "output.weight" not in tensors
        sizes = {name: tuple(map(int, each.shape)) for name, each in tensors.items()}
        bytes_of = {name: int(each.n_bytes) for name, each in tensors.items()}
        kinds = [each.tensor_type.name for each in tensors.values() if len(each.shape) == 2]
        return Prepared(
            path=forms.gguf,
            precision=max(set(kinds), key=kinds.count),
            weights=sum(n for name, n in bytes_of.items() if tied or name != "token_embd.weight"),
            size=forms.gguf.stat().st_size,
            cache=forms.cache_bytes(FP16),
            work=products(sizes),
        )

    def open(self, prepared: Prepared, *, threads: int, context: int) -> Reader:
        return _Reader(prepared.path, threads, context + SPARE)


class _Reader:
    def __init__(self, path: Path, threads: int, longest: int) -> None:
        from llama_cpp import Llama

        # It warns that the cache is longer than the texts it was trained with, and goes on.
        with contextlib.redirect_stderr(io.StringIO()):
            self._model: Any = Llama(
                str(path), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        if self._model.n_ctx() < longest:
            raise ValueError(f"llama.cpp holds {self._model.n_ctx()} tokens of {longest}")
        self._marked = 0

    def read(self, ids: Ids) -> None:
        self._model.eval(ids.tolist())

    def following(self) -> int:
        # Of the last token alone, unless logits_all was asked for.
        shape = (self._model.n_vocab(),)
        return int(np.ctypeslib.as_array(self._model._ctx.get_logits(), shape=shape).argmax())

    def step(self, token: int) -> int:
        self._model.eval([token])
        return self.following()

    def mark(self) -> None:
        self._marked = self._model.n_tokens

    def back(self) -> None:
        self._model.n_tokens = self._marked  # what stands behind is dropped by the next eval

    def reset(self) -> None:
        self._model.n_tokens = 0


PEER = LlamaCpp()
