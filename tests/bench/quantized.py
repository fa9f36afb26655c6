"""Print what quantization costs: `python tests/bench/quantized.py TEXT BUNDLE [BUNDLE ...]`.

Bundles of one model and one pot, the first of them the reference (fp32). Nothing is asserted. Each
bundle reads the same prose through the loop, on the CPU, every graph as it is written; so the text
is scored as it is read, with compressions. With `--emulator`, a bundle also runs on Qualcomm's x86
emulator and is held against itself on the CPU: seconds a step, so only for a model of few layers.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from potexport import htp
from potexport.recording import compare, record
from potexport.runtime.backend import Array
from potexport.runtime.session import Session
from potexport.show_bench import add_to
from potexport.targets import android_npu


class Listening:
    """A backend whose novelties are written down as they are stored, in nats a token."""

    def __init__(self, session: Session) -> None:
        self.inner, self.pot, self.nats = session.backend, session.backend.pot, list[Array]()
        self.decode, self.observe = self.inner.decode, self.inner.observe
        self.compress, self.fork = self.inner.compress, self.inner.fork
        self.policy = self.inner.policy
        session.backend = self

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        last = self.inner.prefill(ids, next_ids, first_novelty)
        fill = self.pot.fill
        self.nats.append(self.pot.novelty[0][0, fill - ids.size : fill].copy())
        return last


def perplexity(bundle: Path, text: str, tokens: int) -> dict[str, Any]:
    """Of all tokens but the first, each scored by what the pot held when it was read."""
    session = Session.open(bundle)
    ids = session.text.encode(text)[: tokens + 1]
    heard, started = Listening(session), perf_counter()
    session.feed(ids)
    nats = np.concatenate(heard.nats)[1:]
    weights = (bundle / session.manifest.weights).stat().st_size
    return {
        "bundle": bundle.name,
        "precision": session.manifest.precision,
        "weight bytes": weights,
        "tokens": int(nats.size),
        "compressions": session.stats.compressions,
        "perplexity": round(math.exp(float(nats.astype(np.float64).mean())), 4),
        "seconds": round(perf_counter() - started, 1),
    }


def emulated(bundle: Path, reference: Path, text: str, read: int, forced: int) -> dict[str, Any]:
    """Logits of the emulator, of the same graphs on the CPU, and of the reference."""
    session, (soc,) = Session.open(bundle), android_npu.TARGET.chips(["sm8650"])
    graphs = list(session.manifest.graphs)
    ids = session.text.encode(text)[: read + forced]
    with tempfile.TemporaryDirectory() as folder:
        done = htp.compile_graphs(bundle, graphs, soc, Path(folder), shared=False)
        files, started = htp.contexts(Path(folder), graphs, soc), perf_counter()
        table = done[0].embedding
        mine = htp.read(bundle, files, ids[:read], embedding=table, forced=ids[read:])
    seconds = perf_counter() - started
    here = record(session, ids[:read], forced=ids[read:])
    plain = record(Session.open(reference), ids[:read], forced=ids[read:])
    return {
        "bundle": bundle.name,
        "emulator against CPU": {**asdict(compare(mine, here)), **_apart(mine.logits, here.logits)},
        "CPU against reference": _apart(here.logits, plain.logits),
        "emulator against reference": _apart(mine.logits, plain.logits),
        "seconds on the emulator": round(seconds, 1),
    }


def _apart(a: Array, b: Array) -> dict[str, float]:
    difference = np.abs(a - b)
    found = {"largest": difference.max(), "mean": difference.mean(), "of": np.abs(b).max()}
    return {name: round(float(number), 5) for name, number in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--skip", type=int, default=200_000, help="characters, past calibration")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--emulator", action="store_true")
    parser.add_argument("--read", type=int, default=160, help="tokens on the emulator")
    parser.add_argument("--forced", type=int, default=8, help="tokens decoded on the emulator")
    parser.add_argument("--into", type=Path, help="add it to the JSON of `potexport bench`")
    asked = parser.parse_args()
    text = asked.text.read_text()[asked.skip :]
    first, all_found = None, []
    for bundle in asked.bundles:
        found = perplexity(bundle, text[: asked.tokens * 12], asked.tokens)
        first = first or found["perplexity"]
        found["against the first"] = f"{found['perplexity'] / first - 1:+.2%}"
        print(json.dumps(found), flush=True)
        all_found.append(found)
    if asked.into:
        add_to(asked.into, "perplexity", all_found)
    for bundle in asked.bundles[1:] if asked.emulator else ():
        found = emulated(bundle, asked.bundles[0], text, asked.read, asked.forced)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
