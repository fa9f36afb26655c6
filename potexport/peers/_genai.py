"""onnxruntime-genai: its own model builder, and its own generator, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from potexport.benching.accounting import read_by_a_token
from potexport.benching.forms import Forms, products
from potexport.errors import PotexportError
from potexport.peers import Prepared, Reader
from potexport.runtime.ids import Ids

PIECE = 1024  # tokens of one pass: its attention holds a score for each pair of tokens
SPARE = 256  # tokens beyond the context, for what is generated
BUILT = "build.json"


@dataclass(frozen=True)
class Genai:
    """precision: as its builder names it."""

    precision: str
    package: str = "onnxruntime-genai"
    module: str = "onnxruntime_genai"

    def prepare(self, forms: Forms, *, context: int) -> Prepared:
        own = forms.facts.max_positions
        positions = own if context + SPARE <= own else context + SPARE
        import onnxruntime_genai

        version = onnxruntime_genai.__version__
        folder = forms.cache / f"onnxruntime-genai-{version}-{self.precision}-{positions}"
        if not (folder / BUILT).is_file():
            self._build(forms.checkpoint, folder, positions)
        seconds = json.loads((folder / BUILT).read_text())["seconds"]
        note = "" if positions == own else (
            f"built with max_position_embeddings {positions:,}, for the model's {own:,}"
        )  # fmt: skip
        return Prepared(
            path=folder,
            precision=self.precision,
            weights=read_by_a_token(folder / "model.onnx"),
            size=(folder / "model.onnx.data").stat().st_size,
            cache=forms.cache_bytes(4),
            work=products(forms.sizes()),
            build_seconds=seconds,
            note=note,
        )

    def _build(self, checkpoint: Path, folder: Path, positions: int) -> None:
        """All of it or, on any failure, none of it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir()
        try:
            source = _with_positions(checkpoint, partial / "source", positions)
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            command += ["--input", str(source), "--output", str(partial / "built")]
            command += ["--precision", self.precision, "--execution_provider", "cpu"]
            command += ["--cache_dir", str(partial / "cache")]
            started = perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
                raise PotexportError(
                    f"onnxruntime-genai's builder failed ({last}); measure without this peer"
                )
            seconds = perf_counter() - started
            (partial / "built" / BUILT).write_text(json.dumps({"seconds": seconds}))
            (partial / "built").replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def open(self, prepared: Prepared, *, threads: int, context: int) -> Reader:
        return _Reader(prepared.path, threads, context + SPARE)


def _with_positions(checkpoint: Path, copy: Path, positions: int) -> Path:
    """Links to the checkpoint, and its config with so many positions: the builder writes a table
    of rotations as long, and refuses to read beyond."""
    copy.mkdir()
    for file in checkpoint.absolute().iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    (copy / "config.json").unlink()
    config["max_position_embeddings"] = positions
    (copy / "config.json").write_text(json.dumps(config, indent=1))
    return copy


class _Reader:
    """One generator. Its cache is one buffer for `longest` tokens."""

    def __init__(self, folder: Path, threads: int, longest: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        options = {"session_options": {"intra_op_num_threads": threads}}
        search = {"max_length": longest, "min_length": longest}  # no end token ends it
        config.overlay(json.dumps({"model": {"decoder": options}, "search": search}))
        self._model: Any = genai.Model(config)
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=longest, min_length=longest)
        self._generator: Any = genai.Generator(self._model, params)
        self._marked = 0

    def read(self, ids: Ids) -> None:
        for first in range(0, ids.size, PIECE):
            self._generator.append_tokens(ids[first : first + PIECE])

    def following(self) -> int:
        return int(self._generator.get_logits()[0, -1].argmax())

    def step(self, token: int) -> int:
        self._generator.append_tokens(np.array([token], np.int32))
        return self.following()

    def mark(self) -> None:
        self._marked = int(self._generator.token_count())

    def back(self) -> None:
        self._generator.rewind_to(self._marked)

    def reset(self) -> None:
        self._generator.rewind_to(0)
