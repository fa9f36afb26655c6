"""The manifest and the folder, without any graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potexport import bundle, folders
from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry, default_geometry
from potexport.spec import Layout

FACTS = ModelFacts("llama", 2, 4, 2, 8, 100, 512)
POT = PotGeometry(64, 8, 32, 48, 8, 2, 4, positions=200)


def manifest() -> Manifest:
    needs = ("mass", "novelty")
    return Manifest(
        model=FACTS,
        pot=POT,
        policies=(PolicyFacts("infinipot", "infinipot", needs, {"alpha": 0.5}),),
        precision="fp32",
        target="cpu",
        runtime="onnxruntime",
        catalyst="what matters?",
        source="model",
        eos_token_ids=(2,),
        graphs=Layout(FACTS, POT, frozenset(needs)).graphs(),
        weights="weights.safetensors",
        tools={"torch": "2"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose graphs are not graphs: enough for everything in this file."""
    made = tmp_path / "bundle"
    with folders.new_folder(made, force=False) as under_way:
        names = ("prefill.onnx", "decode.onnx", "observe.onnx", "compress.onnx")
        for name in (*names, "weights.safetensors", "tokenizer.json"):
            (under_way / name).write_bytes(name.encode())
        folders.seal(under_way, manifest())
    return made


def test_what_is_written_is_read(folder: Path) -> None:
    read = bundle.read(folder)
    bundle.check_files(folder, read)
    assert (read.model, read.pot, read.graphs) == (FACTS, POT, manifest().graphs)


def change(folder: Path, **changes: Any) -> None:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "newer than the 5"),
        ({"format": None}, "no format version"),
        ({"pot": {}}, "not a valid manifest"),
        ({"pot": {**POT.__dict__, "keep": 63}}, "--keep 63"),
        ({"weights": "../weights.safetensors"}, "not the name of a file in the bundle"),
        ({"weights": "/etc/passwd"}, "not the name of a file in the bundle"),
        ({"files": {}}, "not among its files"),
        ({"model": {**FACTS.__dict__, "layers": 3}}, "do not fit its model and pot"),
        ({"graphs": {}}, "not a valid manifest"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    change(folder, **changes)
    with pytest.raises(PotexportError, match=says) as caught:
        bundle.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / bundle.MANIFEST).write_text(text)
    with pytest.raises(PotexportError):
        bundle.read(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "is missing"), (b"decode", "truncated"), (b"decode.onnX", "SHA-256")],
)
def test_a_damaged_file_is_named(folder: Path, content: bytes | None, says: str) -> None:
    path = folder / "decode.onnx"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(PotexportError, match=f"decode.onnx .*{says}"):
        bundle.check_files(folder, bundle.read(folder))


def test_a_failed_build_leaves_nothing_and_keeps_the_old_bundle(folder: Path) -> None:
    def build() -> None:
        with folders.new_folder(folder, force=True) as under_way:
            (under_way / "half").write_text("done")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    bundle.check_files(folder, bundle.read(folder))
    assert os.listdir(folder.parent) == [folder.name]


def test_a_killed_build_leaves_no_bundle_and_the_next_one_sweeps(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib, potexport.folders as f\n"
        "with f.new_folder(pathlib.Path(sys.argv[1]), force=False) as folder:\n"
        "    (folder / 'half').write_text('done')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "b")], cwd=root)
    assert killed.returncode == -9
    assert not (tmp_path / "b").exists()
    assert len(os.listdir(tmp_path)) == 1
    with folders.new_folder(tmp_path / "b", force=False):
        pass
    assert os.listdir(tmp_path) == ["b"]


def test_existing_folders_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PotexportError, match="add --force"):
        folders.refuse_existing(folder, force=False)
    folders.refuse_existing(folder, force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("dear")
    with pytest.raises(PotexportError, match="is not a bundle"):
        folders.refuse_existing(tmp_path / "photos", force=True)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"slots": 24, "chunk": 16, "sink": 8, "recent": 8}, "--pot at least 32"),
        ({"slots": 64, "chunk": 8, "keep": 64}, "no room for a chunk"),
        ({"slots": 64, "chunk": 8, "keep_max": 60}, "no room for a chunk"),
        ({"slots": 64, "chunk": 8, "keep": 4, "sink": 4, "recent": 4}, "between sinks"),
        ({"slots": 600}, "smaller --pot"),
        ({"slots": 0}, "--pot is 0"),
        ({"chunk": -1}, "--chunk is -1"),
        ({"sink": -1}, "--sink is -1"),
    ],
)
def test_geometry_that_cannot_work_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(PotexportError, match=says):
        default_geometry(FACTS, **asked)


@pytest.mark.parametrize("positions", [64, 100, 512, 2048, 8192, 131072])
def test_default_geometry_fits_any_context(positions: int) -> None:
    geometry = default_geometry(ModelFacts("llama", 2, 4, 2, 8, 100, positions))
    assert geometry.positions <= positions
    assert geometry.slots <= 2048
