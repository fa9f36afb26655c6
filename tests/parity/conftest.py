"""Tiny models built once by the real pipeline, for all parity tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potexport import pipeline
from tests import tiny

POT: dict[str, Any] = {
    "pot": 48,
    "chunk": 8,
    "keep": 23,
    "keep_max": 37,
    "catalyst_width": 7,
    "sink": 2,
    "recent": 3,
    "positions": 150,  # enough for some compressions, then all move to the front
}
Build = Callable[..., tuple[Path, Path]]


RUNTIMES = ("onnxruntime", "executorch")


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`builds(family, **options)` -> (bundle, model folder); the same arguments build once.

    The policy is infinipot unless another is asked for.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def builder(family: str = "llama", **options: Any) -> tuple[Path, Path]:
        asked = {"policy": "infinipot", **POT, **options}
        key = repr((family, sorted(asked.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            tiny.save(folder / "model", family)
            pipeline.build(
                pipeline.Options(model=str(folder / "model"), **asked), folder / "bundle"
            )
            made[key] = (folder / "bundle", folder / "model")
        return made[key]

    return builder


@pytest.fixture(params=RUNTIMES)
def build(builds: Build, request: pytest.FixtureRequest) -> Build:
    """`builds` for each runtime in turn: what a test claims holds for all of them."""
    return partial(builds, runtime=request.param)
