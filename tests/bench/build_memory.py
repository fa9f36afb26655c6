"""Print the memory that `potexport build` takes, stage by stage, beside its model's fp32 weights.

`python tests/bench/build_memory.py [--layers 4] [--runtime executorch] [--precision w4] ...`

The model is random, of Llama-3.2-1B's shape, tied, in shards of bf16 as most checkpoints are.
Nothing is asserted. What a process maps from files the kernel can drop and read again; what it
keeps of its own (`RssAnon`) it cannot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny

EVERY = 0.02  # seconds between two samples
GB = 1e9


def shape(layers: int) -> dict[str, Any]:
    """The config of a Llama-3.2-1B with so many layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Each shard's file name, with the names and shapes of its weights: a shard for a layer."""
    hidden, inner, head = (config[n] for n in ("hidden_size", "intermediate_size", "head_dim"))
    queries = config["num_attention_heads"] * head
    rows = config["num_key_value_heads"] * head
    yield (
        "model-table.safetensors",
        {
            "model.embed_tokens.weight": (config["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
        },
    )
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (rows, hidden),
        "self_attn.v_proj": (rows, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for n in range(config["num_hidden_layers"]):
        names = {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
        yield f"model-layer-{n:03}.safetensors", names


def make(folder: Path, layers: int) -> int:
    """Write such a model, a shard at a time; returns how many weights it has."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config, places, count = shape(layers), {}, 0
    noise = torch.Generator().manual_seed(0)
    for file, shapes in tensors(config):
        shard = {}
        for name, size in shapes.items():
            weight = torch.empty(size, dtype=torch.bfloat16)
            shard[name] = (
                weight.fill_(1) if len(size) == 1 else weight.normal_(0, 0.02, generator=noise)
            )
            places[name] = file
            count += weight.numel()
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder)
    return count


@dataclass
class Peak:
    """The most that was resident at one time, in bytes, with its two parts at that time; and the
    most of what is not mapped from a file."""

    whole: int = 0
    own: int = 0
    mapped: int = 0
    most_own: int = 0

    def see(self, own: int, mapped: int) -> None:
        self.most_own = max(self.most_own, own)
        if own + mapped > self.whole:
            self.whole, self.own, self.mapped = own + mapped, own, mapped


@dataclass
class Watched:
    """A build: the peaks of its stages by name, of the whole, and its seconds."""

    stages: dict[str, Peak] = field(default_factory=dict)
    all: Peak = field(default_factory=Peak)
    seconds: float = 0.0


def resident(process: int) -> tuple[int, int]:
    """Bytes of a process that are its own, and that are mapped from files or shared."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
    if not sizes:  # it has ended
        return 0, 0
    return sizes["RssAnon"], sizes["RssFile"] + sizes["RssShmem"]


def watch(command: list[str]) -> Watched:
    """Run a build and sample its memory; each stage's line comes when the stage ends."""
    seen, current, started = Watched(), Peak(), time.perf_counter()
    lines: list[str] = []
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stderr is not None
        reader = threading.Thread(target=lines.extend, args=(run.stderr,), daemon=True)
        reader.start()
        told = 0
        while run.poll() is None:
            now = resident(run.pid)
            for peak in (current, seen.all):
                peak.see(*now)
            if len(lines) > told:  # a stage of less than a sample's time has none of its own
                for line in lines[told:]:
                    seen.stages[line.strip()] = current
                told, current = len(lines), Peak()
            time.sleep(EVERY)
        reader.join()
    if run.returncode:
        raise SystemExit(f"the build failed: {''.join(lines)}")
    seen.seconds = time.perf_counter() - started
    return seen


def show(title: str, seen: Watched, weights: int) -> None:
    print(f"\n{title}: {seen.seconds:.0f} s, fp32 weights {weights / GB:.2f} GB", flush=True)
    for name, peak in {**seen.stages, "peak": seen.all}.items():
        print(
            f"  {name:42} {peak.whole / weights:5.2f} x ({peak.whole / GB:6.2f} GB), of its own"
            f" {peak.own / weights:5.2f} x; most of its own {peak.most_own / weights:5.2f} x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=16, help="16 make 1.2 billion weights")
    parser.add_argument("--runtime", action="append", help="default: both, one after the other")
    parser.add_argument("--precision", action="append", help="default: fp32")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        weights = 4 * make(model, given.layers)
        for runtime in given.runtime or ("onnxruntime", "executorch"):
            for precision in given.precision or ("fp32",):
                command = [sys.executable, "-m", "potexport", "build", str(model), "--output"]
                command += [str(bundle), "--force", "--runtime", runtime]
                seen = watch([*command, "--precision", precision])
                show(f"{runtime}, {precision}", seen, weights)


if __name__ == "__main__":
    main()
