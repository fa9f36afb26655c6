"""Print how far kept keys drift over compressions: `python tests/bench/drift.py [--model FOLDER]`.

For each type of pot, for keys stored rotated or as they were before rotation, and for a context
reset at every compression or only when positions run out. Every reset moves every key to a random
position: a real one moves most of them less. The oracle is the key before it was stored, rotated
to where it stands in float64; what is printed is the root mean square of the error, of all keys of
all layers together, as a share of that of the keys.

Keys are drawn at random, with a few channels far off zero, as models have them; with `--model` they
are those that the model has for a text. With `--cost`, also what a step pays: attention of one
layer in ONNX Runtime, over rotated and over un-rotated keys. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from by_hand import in_turns
from torch import Tensor, nn

from potexport.channels import spread_of
from potexport.graphs.codes import Codes
from potexport.graphs.rope import turn_back
from potexport.runtime import codes
from potexport.runtime.backend import Array

SHOWN = (1, 10, 100, 1000)
POSITIONS, SLOTS, KEEP = 8192, 512, 256
EVERY = (POSITIONS - SLOTS) // (SLOTS - KEEP)  # compressions from one reset to the next
THETA = 1e5
NAMES = ("rows", "keys", "values", "scales", "stood")


@dataclass(frozen=True)
class Case:
    dtype: str
    rotated: bool
    lazy: bool


def tables(size: int) -> tuple[Array, Array]:
    """cos and sin (positions, D/2) float64."""
    frequencies = THETA ** (-np.arange(0, size, 2) / size)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def turn(keys: Array, cos: Array, sin: Array) -> Array:
    """Keys (H, n, D) forward by the angles (H, n, D/2), in float64."""
    first, second = np.split(keys, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def random_keys(heads: int, count: int, size: int) -> Array:
    """(H, n, D) float64: channels of different spreads, an eighth of them far off zero, most of
    these among the slow ones, as in the figures of KIVI and KVQuant."""
    draw = np.random.default_rng(7)
    spread = draw.lognormal(0.0, 0.5, (heads, 1, size))
    centre = draw.normal(0.0, 0.5, (heads, 1, size))
    slow = np.arange(size) % (size // 2) >= size // 4
    far = (draw.random((heads, 1, size)) < 0.25) & slow
    centre = np.where(far, np.sign(centre) * draw.uniform(4.0, 10.0, centre.shape), centre)
    return np.asarray(centre + spread * draw.normal(size=(heads, count, size)))


def model_keys(folder: str, text: Path) -> Array:
    """Those of some six layers of a model before rotation: (H, n, D) float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from potexport import channels
    from potexport.facts import model_facts
    from potexport.geometry import default_geometry
    from potexport.graphs.model import PotModel
    from potexport.spec import Layout

    kind: Any = AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    facts = model_facts(model.config)
    geometry = default_geometry(facts, slots=SLOTS)
    ids = channels.tokens(text.read_text()[100_000:], AutoTokenizer.from_pretrained(folder))
    layout = Layout(facts, geometry, frozenset())
    keys = channels.plain_keys(PotModel(model.eval(), layout.facts, geometry), layout, ids[:512])
    made: Array = keys[:: len(keys) // 6].flatten(0, 1)[:, :KEEP].double().numpy()
    return made


class Store:
    """Keys (H, n, D) as one kind of pot holds them."""

    def __init__(self, dtype: str, channels: Array) -> None:
        self.dtype = dtype
        self.bits = {"int8": 8, "int4": 4}.get(dtype, 0)
        self.channels = channels  # (2, H, D)

    def put(self, keys: Array) -> None:
        if self.bits:
            made = keys.astype(np.float32).transpose(0, 2, 1)
            self.packed, self.scales = codes.code_keys(made, self.channels, self.bits)
        else:
            self.rows = keys.astype(np.float16 if self.dtype == "fp16" else np.float32)

    def get(self) -> Array:
        if not self.bits:
            return self.rows.astype(np.float32)
        made = codes.keys_of(self.packed, self.scales, self.channels, self.bits)
        return made.transpose(0, 2, 1)


def drift(case: Case, keys: Array, compressions: int) -> list[float]:
    """The error after each of SHOWN."""
    heads, count, size = keys.shape
    cos, sin = tables(size)
    low_cos, low_sin = (torch.from_numpy(each.astype(np.float32)) for each in (cos, sin))
    draw = np.random.default_rng(1)
    stood = draw.integers(POSITIONS // 2, POSITIONS, (heads, count))
    seen = _everywhere(keys, cos, sin) if case.rotated else keys
    spread = spread_of(torch.from_numpy(seen.astype(np.float32))[None])
    store = Store(case.dtype, spread[0].numpy())
    store.put(turn(keys, cos[stood], sin[stood]) if case.rotated else keys)
    found = []
    for number in range(1, compressions + 1):
        rows = store.get()
        if not case.lazy or number % EVERY == 0:
            moved = draw.integers(0, POSITIONS, (heads, count))
            if case.rotated:  # the same turn as in the compression graph, in float32
                rows = _turned(rows, stood - moved, low_cos, low_sin)
            stood = moved
        store.put(rows)  # whether turned or not: so does a compression
        if number in SHOWN:
            exact = turn(keys, cos[stood], sin[stood])
            mine = store.get().astype(np.float64)
            mine = mine if case.rotated else turn(mine, cos[stood], sin[stood])
            found.append(float(np.sqrt(((mine - exact) ** 2).mean() / (exact**2).mean())))
    return found


def _turned(rows: Array, back: Array, cos: Tensor, sin: Tensor) -> Array:
    flat, by = torch.from_numpy(rows).reshape(-1, rows.shape[-1]), torch.from_numpy(back).flatten()
    sign = torch.sign(by)[:, None]  # a turn forward is one back with the sine turned round
    made = turn_back(flat, torch.cat([cos[by.abs()], sin[by.abs()] * sign], dim=-1))
    return made.reshape(rows.shape).numpy()


def _everywhere(keys: Array, cos: Array, sin: Array) -> Array:
    """Keys turned to positions all over the tables: (H, 64 * n, D)."""
    places = np.linspace(0, POSITIONS - 1, 64).astype(int)
    return np.concatenate([turn(keys, cos[place], sin[place]) for place in places], axis=1)


class Attention(nn.Module):
    """One layer over a body of codes; un-rotated ones are turned where they stand, at each step."""

    def __init__(self, heads: int, size: int, rotated: bool) -> None:
        super().__init__()
        self.rotated = rotated
        self.channels = nn.Buffer(torch.ones(1, 2, heads, size))
        cos, sin = (torch.from_numpy(each.astype(np.float32)) for each in tables(size))
        self.turn = nn.Buffer(torch.cat([cos, sin], dim=-1))

    def forward(
        self, rows: Tensor, keys: Tensor, values: Tensor, scales: Tensor, stood: Tensor
    ) -> Tensor:
        held = Codes(
            torch.zeros(1, dtype=torch.int32),
            self.channels,
            [(keys, values, scales, scales)],
            [stood],
            self.turn,
            0,
        )
        if self.rotated:  # what belongs to a channel, into the query; to a slot, into its score
            centre, spread = self.channels[0, 0], self.channels[0, 1]
            product = (rows * spread[:, None]) @ keys[0].float()
            scores = product * scales[:, None] + rows @ centre[:, :, None]
        else:
            scores = held.scores(0, rows)
        return held.values(0, torch.softmax(scores, -1))


def cost(width: int, *, heads: int = 3, group: int = 3, size: int = 64) -> tuple[float, float]:
    """Milliseconds of one layer's attention over 512 slots, keys rotated and un-rotated."""
    import onnxruntime

    draw = torch.manual_seed(0)
    given = (
        torch.randn(heads, group * width, size, generator=draw),
        torch.randint(-127, 128, (1, heads, size, SLOTS), generator=draw).to(torch.int8),
        torch.randint(-127, 128, (1, heads, SLOTS, size), generator=draw).to(torch.int8),
        torch.rand(heads, SLOTS, generator=draw),
        torch.randint(0, POSITIONS, (heads, SLOTS), generator=draw).to(torch.int32),
    )
    runs: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for rotated in (True, False):
            path = f"{folder}/{rotated}.onnx"
            program: Any = torch.onnx.export(
                Attention(heads, size, rotated).eval(), given, dynamo=True, verbose=False
            )
            program.save(path)
            session = onnxruntime.InferenceSession(path)
            names = [each.name for each in session.get_inputs()]
            held = {
                name: tensor.numpy()
                for name, tensor in zip(NAMES, given, strict=True)
                if name in names
            }
            runs.append(lambda session=session, held=held: session.run(None, held))
        rotated_time, plain_time = in_turns(runs, rounds=15, each=20)
    return 1e3 * rotated_time, 1e3 * plain_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder with a model whose keys are taken")
    parser.add_argument("--text", type=Path, default=Path("data/pride-and-prejudice.txt"))
    parser.add_argument("--compressions", type=int, default=SHOWN[-1])
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    keys = model_keys(asked.model, asked.text) if asked.model else random_keys(6, KEEP, 64)
    print(f"{keys.shape[0]} heads of {keys.shape[2]}, {keys.shape[1]} keys each; lazily: a reset "
          f"every {EVERY} compressions")  # fmt: skip
    print("| pot | keys stored | reset | " + " | ".join(map(str, SHOWN)) + " |")
    print("|---|---|---|" + "---|" * len(SHOWN))
    for dtype in ("fp32", "fp16", "int8", "int4"):
        for rotated in (True, False):
            for lazy in (False, True):
                found = drift(Case(dtype, rotated, lazy), keys, asked.compressions)
                how = "rotated" if rotated else "un-rotated", "lazily" if lazy else "every time"
                print(f"| {dtype} | {' | '.join(how)} | "
                      + " | ".join(f"{each:.2g}" for each in found) + " |", flush=True)  # fmt: skip
    if asked.cost:
        for width in (1, 64):
            print(json.dumps({"tokens": width, "ms, rotated and un-rotated": cost(width)}))


if __name__ == "__main__":
    main()
