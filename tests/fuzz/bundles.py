"""Bundles that somebody changed, as who means harm would: with sizes and digests made anew.

Each case is made from its seed alone, so that it can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.templates import template
from tests.fuzz.values import change, damaged, dumped, strange

MANIFEST = "potexport.json"
PATTERNS = (
    "(a+)+$", "(a|aa)+$", "(.*)*x", r"(a)\1", "a*a*a*a*b", "a*a+b", "(", "[", "a{1,99999}",
    "(?=a)*", r"\p{Nope}", "((((((a?)?)?)?)?)?)*", r"(?<x>a)\g<x>", ".*.*.*=",
    "[^" + "a" * 9000 + "]",
)  # fmt: skip
Mutation = Callable[[Path, random.Random], None]


def make(original: Path, folder: Path, seed: int) -> str:
    """Make the bundle of a seed in an empty folder; what was done to it, in a word."""
    chance = random.Random(seed)
    for path in original.iterdir():
        os.link(path, folder / path.name)
    mutations = list(WEIGHTS)
    mutation = chance.choices(mutations, list(WEIGHTS.values()))[0]
    mutation(folder, chance)
    return mutation.__name__


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the original is another name of the same file
    path.write_bytes(data)


def _sealed(path: Path, data: bytes) -> None:
    """Write a file, and its size and digest into the manifest."""
    _write(path, data)
    manifest = json.loads((path.parent / MANIFEST).read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][path.name] = {"size": len(data), "sha256": digest}
    _write(path.parent / MANIFEST, json.dumps(manifest).encode())


def manifest(folder: Path, chance: random.Random) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        part = chance.choice((None, None, "model", "pot", "policies", "graphs", "files"))
        if part is None:
            document = change(document, chance)
        elif isinstance(document, dict) and part in document:
            document[part] = change(document[part], chance)
    _write(folder / MANIFEST, dumped(document, chance))


def manifest_that_agrees(folder: Path, chance: random.Random) -> None:
    """Other numbers, and graphs as the manifest of such a pot would have them."""
    from dataclasses import asdict, replace

    from potexport import bundle

    known = bundle.read(folder)
    model = asdict(known.model)
    for name in chance.sample(("layers", "query_heads", "kv_heads", "head_size", "vocab_size"), 2):
        numbers = (1, 2, 3, 8, 100, 512, 1024, 1 << 20)
        # Each layer has names of its own: a million of them are gigabytes, which nobody would send.
        model[name] = chance.choice(numbers[: -1 if name == "layers" else None])
    pot = asdict(known.pot)
    factor = chance.choice((1, 2, 16, 512))
    for name in ("slots", "keep", "keep_max", "positions"):
        pot[name] *= factor
    try:
        facts, geometry = type(known.model)(**model), type(known.pot)(**pot)
        changed = replace(known, model=facts, pot=geometry)
        changed = replace(changed, graphs=changed.layout.graphs())
    except Exception:  # a model that there cannot be
        changed = known
    _write(folder / MANIFEST, changed.to_json().encode())


def manifest_bytes(folder: Path, chance: random.Random) -> None:
    _write(folder / MANIFEST, damaged((folder / MANIFEST).read_bytes(), chance))


def any_file(folder: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    _write(path, damaged(path.read_bytes(), chance))


def graph_bytes(folder: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(folder.glob("*.onnx")))
    _sealed(path, damaged(path.read_bytes(), chance))


def graph(folder: Path, chance: random.Random) -> None:
    from tests.fuzz.graphs import changed

    path = chance.choice(sorted(folder.glob("*.onnx")))
    _sealed(path, changed(path.read_bytes(), chance))


def weights(folder: Path, chance: random.Random) -> None:
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    if chance.random() < 0.3:
        _sealed(path, damaged(data, chance))
        return
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(chance.choice((1, 1, 3))):
        header = change(header, chance)
    text = dumped(header, chance)
    size = chance.choice((len(text), len(text), len(text), 0, 1 << 40, (1 << 64) - 1, len(data)))
    _sealed(path, size.to_bytes(8, "little") + text + rest)


def tokenizer(folder: Path, chance: random.Random) -> None:
    path = folder / "tokenizer.json"
    document: Any = json.loads(path.read_text())
    pick = chance.randrange(5)
    if pick == 0:
        pattern = {"Regex": chance.choice(PATTERNS)}
        document["pre_tokenizer"] = {
            "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False
        }  # fmt: skip
    elif pick == 1:
        part = {
            "type": "Replace",
            "pattern": {"String": "a"},
            "content": "a" * chance.choice((2, 99)),
        }
        document["normalizer"] = {
            "type": "Sequence",
            "normalizers": [part] * chance.choice((1, 40)),
        }
    elif pick == 2:
        size = chance.choice((10, 100_000))
        document["model"]["vocab"] |= {f"t{n}": n for n in range(size)}
    else:
        for _ in range(chance.choice((1, 1, 3))):
            if isinstance(document, dict) and document and chance.random() < 0.7:
                part_name = chance.choice(list(document))
                document[part_name] = change(document[part_name], chance)
            else:
                document = change(document, chance)
    _sealed(path, dumped(document, chance))


def tokenizer_bytes(folder: Path, chance: random.Random) -> None:
    path = folder / "tokenizer.json"
    _sealed(path, damaged(path.read_bytes(), chance))


def chat_template(folder: Path, chance: random.Random) -> None:
    text = template(chance).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        text = damaged(text, chance)
    _sealed(folder / "chat_template.jinja", text)


def config(folder: Path, chance: random.Random) -> None:
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    if chance.random() < 0.3:
        document["chat_template"] = strange(chance)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    _sealed(path, dumped(change(document, chance), chance))


def kind_of_file(folder: Path, chance: random.Random) -> None:
    """Something else than a file where one should be; sometimes one that the manifest lacks."""
    path = chance.choice(sorted(folder.iterdir()))
    path.unlink()
    pick = chance.randrange(5)
    if pick == 0:
        os.mkfifo(path)
    elif pick == 1:
        path.symlink_to(chance.choice(("/dev/zero", "/etc/passwd", "nowhere", path.name)))
    elif pick == 2:
        path.mkdir()
    elif pick == 3:
        shutil.copy(folder / MANIFEST if path.name != MANIFEST else "/etc/hostname", path)


def saved(folder: Path, chance: random.Random) -> None:
    """A saved session that the bundle is opened with; `original` has one (`worker.prepare`)."""
    path = folder / "session.pot"
    data = path.read_bytes()
    if chance.random() < 0.5:
        _write(path, damaged(data, chance))
        return
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.5:
        facts = change(json.loads(header["__metadata__"]["potexport"]), chance)
        said = json.dumps(facts)
        digest = hashlib.sha256(said.encode() + data[8 + length :]).hexdigest()
        header["__metadata__"] = {"potexport": said, "sha256": digest}
    else:
        header = change(header, chance)
    text = dumped(header, chance)
    _write(path, len(text).to_bytes(8, "little") + text + data[8 + length :])


def gguf(folder: Path, chance: random.Random) -> None:
    """A model's file, which is read in place of the bundle."""
    path = folder / "model.gguf"
    if path.exists():
        _write(path, damaged(path.read_bytes(), chance))


# How often each is chosen.
WEIGHTS: dict[Mutation, int] = {
    manifest: 26, manifest_that_agrees: 4, manifest_bytes: 4, any_file: 4, graph_bytes: 12,
    graph: 12, weights: 7, tokenizer: 7, tokenizer_bytes: 3, chat_template: 10, config: 2,
    kind_of_file: 2, saved: 5, gguf: 2,
}  # fmt: skip
