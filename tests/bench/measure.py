"""Print what a bundle costs: `python tests/bench/measure.py BUNDLE [TOKENS]`.

Nothing is asserted. Each part runs in a process of its own, for memory does not come back; speeds
are compared within one run and in turns, for machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

NOVEL = Path(__file__).parents[2] / "data" / "pride-and-prejudice.txt"
MIB = 1 << 20


def peak() -> float:
    """The most memory this process ever held, MiB (resident, mapped files included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_turns(actions: list[Callable[[], Any]], *, rounds: int, each: int) -> list[float]:
    """Median seconds of each action; A A B B A A B B, the first of each turn not counted."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, taken in zip(actions, times, strict=True):
            action()
            for _ in range(each):
                started = perf_counter()
                action()
                taken.append(perf_counter() - started)
    return [median(taken) for taken in times]


def by_hand(folder: Path, graph: str, fill: int) -> Callable[[], Any]:
    """One step of the best loop one would write over the same graph.

    A plain session, everything bound once to arrays, and the new rows copied into the pot.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(folder / f"{graph}.onnx", options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    types = {"tensor(int32)": np.int32, "tensor(float16)": np.float16}
    arrays, values = {}, []
    for tensors, bind in (
        (session.get_inputs(), binding.bind_ortvalue_input),
        (session.get_outputs(), binding.bind_ortvalue_output),
    ):
        for tensor in tensors:
            arrays[tensor.name] = array = np.zeros(tensor.shape, types.get(tensor.type, np.float32))
            values.append(ort.OrtValue.ortvalue_from_numpy(array))
            bind(tensor.name, values[-1])
    arrays["past_seq_len"][0] = fill
    rows = [
        (arrays[n.replace("present", "past_key_values")], arrays[n])
        for n in arrays
        if "present" in n
    ]

    def step() -> None:
        session.run_with_iobinding(binding)
        for past, new in rows:
            if past.shape[2] == new.shape[2]:  # keys: (1, Hkv, D, slots)
                past[..., fill : fill + new.shape[3]] = new
            else:
                past[:, :, fill : fill + new.shape[2]] = new

    return step


def against_hand_made(folder: Path) -> dict[str, Any]:
    from potexport.runtime.session import Session

    session = Session.open(folder, threads=2, check=False)
    backend, pot = session.backend, session.manifest.pot
    fill = pot.slots // 2
    ids = np.arange(pot.chunk + 1, dtype=np.int32) + 1000

    def prefill() -> None:
        backend.pot.fill = fill
        backend.prefill(ids[:-1], ids[1:], 0.0)

    def decode() -> None:
        backend.pot.fill = fill
        backend.decode(1000, 0.0)

    figures = {}
    for name, ours, rounds, each in (("decode", decode, 8, 10), ("prefill", prefill, 8, 3)):
        mine, hand = in_turns([ours, by_hand(folder, name, fill)], rounds=rounds, each=each)
        tokens = 1 if name == "decode" else pot.chunk
        figures[name] = {
            "tokens/s": round(tokens / mine, 1),
            "by hand, tokens/s": round(tokens / hand, 1),
            "ratio": round(hand / mine, 3),
        }
    return figures


def long_read(folder: Path, tokens: int) -> dict[str, Any]:
    from potexport import bundle
    from potexport.runtime.session import Session

    started = perf_counter()
    session = Session.open(folder, threads=2)
    opened = perf_counter() - started
    words = NOVEL.read_text()
    text: list[np.ndarray[Any, Any]] = []
    while sum(map(len, text)) < tokens:  # in pieces: the tokenizer needs 200 bytes a character
        text += [session.text.encode(words[i : i + 20_000]) for i in range(0, len(words), 20_000)]
    ids = np.concatenate(text)[:tokens]
    chunk = session.manifest.pot.chunk
    first_peak, times, counts = 0.0, [], []
    for first in range(0, tokens, chunk):
        started = perf_counter()
        session.feed(ids[first : first + chunk])
        times.append(perf_counter() - started)
        counts.append(session.stats.compressions)
        if not first_peak and counts[-1]:
            first_peak = peak()
    begin = next(i for i, count in enumerate(counts) if count)
    tenth = max(1, (len(times) - begin) // 10)
    early, late = times[begin : begin + tenth], times[-tenth:]
    manifest = bundle.read(folder)
    weights = manifest.files[manifest.weights].size
    limit = (1.3 * (weights + session.backend.pot.bytes) + 200e6) / MIB
    stats = session.stats
    return {
        "tokens": stats.tokens_read,
        "compressions": stats.compressions,
        "tokens/s": round(stats.read_speed, 1),
        "share of time in compressions": round(
            stats.compress_seconds / (stats.read_seconds + stats.compress_seconds), 4
        ),
        "seconds to open": round(opened, 2),
        "weights, MiB": round(weights / MIB),
        "pot, MiB": round(session.backend.pot.bytes / MIB),
        "peak after first compression, MiB": round(first_peak, 1),
        "peak at the end, MiB": round(peak(), 1),
        "peak: end / first compression": round(peak() / first_peak, 4),
        "peak allowed: 1.3 x (weights + pot) + 200 MB, MiB": round(limit, 1),
        "chunk, first tenth after first compression, ms": round(1e3 * float(np.mean(early)), 1),
        "chunk, last tenth, ms": round(1e3 * float(np.mean(late)), 1),
        "chunk: last / first tenth": round(float(np.mean(late) / np.mean(early)), 3),
    }


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokens", type=int, nargs="?", default=100_000)
    asked = parser.parse_args()
    hand = alone(against_hand_made, asked.bundle)
    print(json.dumps({"against a hand-made loop": hand}, indent=1), flush=True)
    read = alone(long_read, asked.bundle, asked.tokens)
    print(json.dumps({"a long read": read}, indent=1))


if __name__ == "__main__":
    main()
