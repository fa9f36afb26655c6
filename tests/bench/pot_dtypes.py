"""Print what a coded pot costs: `python tests/bench/pot_dtypes.py TEXT BUNDLE [BUNDLE ...]`.

Bundles of one model and one pot that differ in `--pot-dtype`, the first of them the reference
(fp32), with a policy that looks at no keys, so that all keep the same slots. Each reads the same
prose past its pot and then the next tokens one by one: their perplexity, and how far the logits lie
from the reference's. Then seconds of a step, the bundles in turns. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from by_hand import in_turns

from potexport.runtime.backend import Array
from potexport.runtime.session import Session


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    made: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return made


def scored(session: Session, ids: Array, read: int) -> Array:
    """Logits (n, V) of the tokens behind the first `read`."""
    session.reset()
    session.feed(ids[:read])
    rows = []
    for token in ids[read:].tolist():
        rows.append(log_softmax(session.logits()).astype(np.float32))
        session.accept(token)
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--read", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--places", type=int, default=3, help="how many pieces of the text")
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8")
    results: list[dict[str, Any]] = []
    wanted: Array | None = None
    sessions = [Session.open(bundle, policy="streaming") for bundle in asked.bundles]
    size = asked.read + asked.steps
    starts = np.linspace(len(text) // 10, len(text) * 9 // 10 - 10 * size, asked.places).astype(int)
    pieces = [sessions[0].text.encode(text[s : s + 10 * size])[:size] for s in starts.tolist()]
    for bundle, session in zip(asked.bundles, sessions, strict=True):
        rows = np.concatenate([scored(session, ids, asked.read) for ids in pieces])
        ids = np.concatenate([piece[asked.read :] for piece in pieces])
        nats = -rows[np.arange(ids.size), ids]
        wanted = rows if wanted is None else wanted
        divergence = (np.exp(wanted) * (wanted - rows)).sum(axis=-1)
        results.append({
            "bundle": bundle.name,
            "pot bytes": session.backend.pot.bytes,
            "perplexity": round(math.exp(float(nats.mean())), 3),
            "divergence, nats": round(float(divergence.mean()), 5),
            "same best token": round(float((rows.argmax(-1) == wanted.argmax(-1)).mean()), 3),
        })  # fmt: skip
    for each in sessions:
        each.reset()
        each.feed(pieces[0][:300])
    backends = [each.backend for each in sessions]
    fill, chunk = backends[0].pot.fill, sessions[0].manifest.pot.chunk
    ids = pieces[0][:chunk]

    def again(run: Any, backend: Any) -> Any:
        def action() -> None:
            run(backend)
            if backend.pot.room <= chunk:
                backend.pot.fill = fill

        return action

    for name, run in (
        ("decode ms", lambda backend: backend.decode(5, 0.0)),
        ("prefill ms", lambda backend: backend.prefill(ids, ids, 0.0)),
    ):
        times = in_turns([again(run, each) for each in backends], rounds=asked.rounds, each=8)
        for result, seconds in zip(results, times, strict=True):
            result[name] = round(1e3 * seconds, 2)
            result[f"{name.split()[0]} ratio"] = round(seconds / times[0], 3)
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
