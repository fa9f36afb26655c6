"""Print what our runtime costs beside a loop made by hand: `python tests/bench/by_hand.py BUNDLE`.

Over the same ONNX graphs, within one run and in turns, for machines are noisy. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np


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

    A plain session, everything bound once to arrays, and the new rows copied into the pot, or
    written into it by the graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(folder / f"{graph}.onnx", options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    types = {"tensor(int32)": np.int32, "tensor(float16)": np.float16}
    arrays, values = dict[str, Any](), dict[str, Any]()
    for tensors, bind in (
        (session.get_inputs(), binding.bind_ortvalue_input),
        (session.get_outputs(), binding.bind_ortvalue_output),
    ):
        for tensor in tensors:
            past = tensor.name.replace("present", "past_key_values")
            if past in arrays and list(arrays[past].shape) == tensor.shape:
                bind(tensor.name, values[past])
                continue
            arrays[tensor.name] = array = np.zeros(tensor.shape, types.get(tensor.type, np.float32))
            values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
            bind(tensor.name, values[tensor.name])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    print(json.dumps(against_hand_made(parser.parse_args().bundle), indent=1))


if __name__ == "__main__":
    main()
