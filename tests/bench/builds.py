"""Print how long builds take: `python tests/bench/builds.py MODEL BENCH.json [--cache FOLDER]`.

Ours, whole, from a Hugging Face folder, beside onnxruntime-genai's builder from the same folder;
each in a process of its own and in turns. What is found is added to the JSON of `potexport bench`.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from potexport import peers
from potexport.benching.figures import Spread
from potexport.benching.forms import Forms
from potexport.facts import model_facts
from potexport.loader import read_config, resolve
from potexport.show_bench import add_to

ROUNDS = 2
PEER = "onnxruntime-genai-int4"


def ours(checkpoint: Path, folder: Path, precision: str) -> float:
    command = [sys.executable, "-m", "potexport", "build", str(checkpoint)]
    command += ["--output", str(folder / "bundle"), "--precision", precision, "--target", "cpu"]
    started = perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return perf_counter() - started


def theirs(forms: Forms, folder: Path) -> float:
    forms.cache = folder
    seconds = peers.load(PEER).prepare(forms, context=1).build_seconds
    assert seconds is not None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("figures", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    asked = parser.parse_args()
    forms = Forms(asked.model, asked.cache, model_facts(read_config(resolve(asked.model))))
    checkpoint = forms.checkpoint
    # That of the first bundle that was measured.
    precision = json.loads(asked.figures.read_text())["parties"][0]["precision"]
    builders: dict[str, Callable[[Path], float]] = {
        "potexport": lambda folder: ours(checkpoint, folder, precision)
    }
    if peers.version(PEER):
        builders[PEER] = lambda folder: theirs(forms, folder)
    found: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(ROUNDS):
        for name, build in builders.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(build(Path(folder)))
    builds = {name: asdict(Spread.some(seconds)) for name, seconds in found.items()}
    print(json.dumps(builds, indent=1))
    add_to(asked.figures, "builds", builds)


if __name__ == "__main__":
    main()
