"""Bundles that mean harm: each is refused in one line, before it costs memory or time.

Whoever changes a bundle also changes its digests, and so do these tests. `tests/fuzz` looks for
more of the kind; what it or a reader found stands here by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from potexport import bundle, folders, gguf_source
from potexport.errors import PotexportError
from potexport.runtime import limits
from potexport.runtime.session import Session
from potexport.runtime.text import Text
from tests.e2e.helpers import ROOT

Change = Callable[[Any], None]


def seal(folder: Path, name: str, data: bytes) -> None:
    """Write a file of a bundle, and its size and digest into the manifest."""
    (folder / name).write_bytes(data)
    document = json.loads((folder / bundle.MANIFEST).read_text())
    document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / bundle.MANIFEST).write_text(json.dumps(document))


def refused(folder: Path, says: str, **options: Any) -> None:
    with pytest.raises(PotexportError, match=says) as caught:
        Session.open(folder, threads=1, **options)
    assert str(caught.value).isprintable()


def test_a_bundle_is_opened_within_the_memory_that_it_says(copy: Path) -> None:
    planned = limits.planned(bundle.read(copy))
    weights = (copy / "weights.safetensors").stat().st_size
    assert weights < planned < weights + (1 << 20)
    refused(copy, "takes 0 MiB and more of memory, and may take 0", max_bytes=planned)
    session = Session.open(copy, threads=1, max_bytes=planned + (16 << 20))
    session.feed("The fox")
    assert len(list(session.generate(max_new_tokens=2))) == 2


# One for each place where a file names what ONNX Runtime would follow, load or make.
def _location(model: Any) -> None:
    weight = next(each for each in model.graph.initializer if each.external_data)
    weight.external_data[0].value = "/etc/passwd"


def _sub_graph(model: Any) -> None:
    empty = helper.make_graph([], "within", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", empty))


def _constants(model: Any) -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [100_000, 100_000])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    model.graph.initializer.extend([shape, one])
    model.graph.node.append(helper.make_node("Expand", ["one", "shape"], ["all"]))


def _broadcast(model: Any) -> None:
    for name, shape in (("tall", [1 << 12, 1]), ("wide", [1, 1 << 12])):
        zeros = helper.make_tensor(name, TensorProto.FLOAT, shape, bytes(1 << 14), raw=True)
        model.graph.initializer.append(zeros)
    model.graph.node.append(helper.make_node("Add", ["tall", "wide"], ["all"]))


def _order(model: Any) -> None:
    model.graph.node.insert(0, helper.make_node("Add", ["later", "later"], ["all"]))
    model.graph.node.append(helper.make_node("Expand", ["one", "shape"], ["later"]))


def _operator(model: Any) -> None:
    model.graph.node[0].op_type = "ConstantOfShape"


def _domain(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _function(model: Any) -> None:
    model.functions.append(onnx.FunctionProto(name="f", domain="d"))


def _sparse(model: Any) -> None:
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(dims=[1 << 40]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_location, "is in b'/etc/passwd'"),
        (_sub_graph, "a graph or a tensor within a node"),
        (_constants, "operator b'Expand' on constants"),
        (_broadcast, "its constants make 16777216 numbers"),
        (_order, "a b'Add' of what is not made yet"),
        (_operator, "the operator b'ConstantOfShape'"),
        (_domain, "the operators of b'com.example'"),
        (_function, "it has functions"),
        (_sparse, "sparse weights"),
    ],
)
def test_a_graph_holds_what_builds_write_and_nothing_else(
    copy: Path, change: Change, says: str
) -> None:
    model = onnx.load_model(copy / "decode.onnx", load_external_data=False)
    change(model)
    seal(copy, "decode.onnx", model.SerializeToString())
    refused(copy, f"decode.onnx is no graph of a bundle: .*{says}")


def test_a_graph_computes_within_the_memory_of_its_session(copy: Path) -> None:
    """A tensor of 40 GB, made of what a graph is given, is not there before it runs."""
    model = onnx.load_model(copy / "decode.onnx", load_external_data=False)
    times = helper.make_tensor("times", TensorProto.INT64, [1], [10_000_000_000])
    model.graph.initializer.append(times)
    given = model.graph.input[1].name
    bomb = [
        helper.make_node("Cast", [given], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Tile", ["one", "times"], ["all"]),
        helper.make_node("ReduceMax", ["all"], ["most"], keepdims=0),
    ]
    logits = next(each for each in model.graph.node if "logits" in each.output)
    logits.output[0] = "quiet"
    bomb.append(helper.make_node("Add", ["quiet", "most"], ["logits"]))
    model.graph.node.extend(bomb)
    seal(copy, "decode.onnx", model.SerializeToString())
    session = Session.open(copy, threads=1, max_bytes=64 << 20)
    session.feed("The fox")
    with pytest.raises(PotexportError, match="ONNX Runtime stopped within a graph"):
        session.logits()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ('{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}', "another size"),
        ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "outside of the file"),
        ('{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}', "type or shape"),
        ('{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "is a bool"),
        ('{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', "type or shape"),
        ("[" * 100_000, "recursion"),
        ("7", "not a dict"),
    ],
)
def test_a_weights_file_lies_to_nobody(copy: Path, header: str, says: str) -> None:
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    seal(copy, "weights.safetensors", data)
    refused(copy, f"not a readable safetensors file .*{says}")


def test_a_weights_file_that_announces_an_endless_header_is_not_read(copy: Path) -> None:
    seal(copy, "weights.safetensors", (1 << 40).to_bytes(8, "little") + b"{}")
    refused(copy, "its header has 1099511627776 bytes")


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("pre_tokenizer", "(a+)+$", "repeats lie within repeats"),
        ("pre_tokenizer", "a*a*a*a*b", "more than 3 repeats in a row"),
        ("pre_tokenizer", r"(a)\1", "refers back"),
        ("pre_tokenizer", "(a|aa)+$", "gave up on this text"),  # a panic of the library's
        ("pre_tokenizer", "a*a+b", "takes too long"),
        ("normalizer", "aa", "make over 64 characters of one"),
    ],
)
def test_a_tokenizer_cannot_run_away_with_a_text(
    copy: Path, part: str, value: str, says: str
) -> None:
    document = json.loads((copy / "tokenizer.json").read_text())
    if part == "pre_tokenizer":
        document[part] = {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated",
                          "invert": False}  # fmt: skip
    else:
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": value}
        document[part] = {"type": "Sequence", "normalizers": [step] * 40}
    seal(copy, "tokenizer.json", json.dumps(document).encode())
    refused(copy, says)


def test_a_tokenizer_of_another_model_is_noticed(copy: Path) -> None:
    document = json.loads((copy / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {"fox": 300_000}
    document["model"]["merges"] = [["f", "o"], ["fo", "x"]]
    document["model"]["vocab"] |= {"fo": 299_999}
    seal(copy, "tokenizer.json", json.dumps(document).encode())
    session = Session.open(copy, threads=1)
    with pytest.raises(PotexportError, match="is outside the vocabulary of 307"):
        session.feed("fox")


def test_a_tokenizer_with_two_tokens_of_one_id_is_refused_where_it_matters(copy: Path) -> None:
    """The library reads it, and not what it writes of it: one of the two, by chance."""
    document = json.loads((copy / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {f"again {n}": n for n in range(300)}
    seal(copy, "tokenizer.json", json.dumps(document).encode())
    session = Session.open(copy, threads=1)
    with pytest.raises(PotexportError, match="the tokenizer contradicts itself"):
        session.text.encode("fox", trusted=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", bundle.MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_file_is_not_opened(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for somebody to write
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/etc/passwd")
    refused(copy, "is missing|has no potexport.json")


def test_a_file_that_the_manifest_does_not_name_is_not_read(copy: Path) -> None:
    document = json.loads((copy / bundle.MANIFEST).read_text())
    del document["files"]["chat_template.jinja"]
    (copy / bundle.MANIFEST).write_text(json.dumps(document))
    assert not Session.open(copy, threads=1).text.has_template
    path = copy / "tokenizer_config.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PotexportError, match="cannot be read: it is no file"):
        Text.open(copy)


def test_a_gguf_with_an_endless_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key, array, of_bytes = b"k", (9).to_bytes(4, "little"), bytes(4)
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")  # of tensors, of keys
    start = b"GGUF" + (3).to_bytes(4, "little") + counts + len(key).to_bytes(8, "little") + key
    for length in (1 << 60, 1 << 20):
        path.write_bytes(start + array + of_bytes + length.to_bytes(8, "little"))
        with pytest.raises(PotexportError, match="is cut short or damaged"):
            gguf_source.metadata(path)
        path.unlink()


def test_a_bundle_that_a_killed_build_had_set_aside_comes_back(copy: Path) -> None:
    """Where names cannot be exchanged, there is a moment between two renames."""
    before = (copy / bundle.MANIFEST).read_bytes()
    aside = copy.parent / f".{copy.name}.building-999999999-x"
    aside.mkdir()
    copy.rename(aside / folders.OLD)
    with pytest.raises(RuntimeError), folders.new_folder(copy, force=True):
        raise RuntimeError
    assert (copy / bundle.MANIFEST).read_bytes() == before
    assert not aside.exists()


def test_names_are_exchanged_at_once(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").touch()
    assert folders._exchange(one, other) is (sys.platform == "linux")
    assert (other if sys.platform == "linux" else one).joinpath("a").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="memory and time are limited as Linux does")
def test_changed_bundles(bundle: Path) -> None:  # `make fuzz` tries 10,000
    command = [sys.executable, "-m", "tests.fuzz.run", str(bundle), "--cases", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


BUILDING = """
import itertools, pathlib, sys
from potexport import folders
for number in itertools.count():
    with folders.new_folder(pathlib.Path(sys.argv[1]), force=True) as folder:
        for name in ("one", "two", "potexport.json"):
            (folder / name).write_text(str(number))
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed build may set aside")
def test_a_folder_is_replaced_at_once(tmp_path: Path) -> None:
    """A process that replaces it again and again is killed at any moment, ten times; `make kills`
    does so with whole builds."""
    folder, chance = tmp_path / "b", random.Random(0)
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", BUILDING, folder], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0, 0.01))
        child.kill()
        said = child.stdout.read().split()
        child.wait()
        last = int(said[-1]) if said else 0
        (number,) = {path.read_text() for path in folder.iterdir()}
        assert len(list(folder.iterdir())) == 3
        assert int(number) in (last, last + 1)
        assert len(os.listdir(tmp_path)) <= 2  # the next one removes what the killed one left
