"""Runs each case in a process of its own, forked from one that has imported everything.

A case must end in an answer or in a PotexportError of one line: within a time, within the memory
that the session was opened with, and by itself.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import onnx  # noqa: F401  (imported once, for all cases)

from potexport import gguf_source
from potexport.errors import PotexportError
from potexport.runtime import onnxruntime_backend, ort_capi  # noqa: F401
from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session
from tests.fuzz import bundles, graphs  # noqa: F401

MOST_SECONDS = 5  # of a processor; no case takes a tenth of it
MOST_WAIT = 60  # seconds, for a process that waits and does not work
MAX_BYTES = 128 << 20  # what sessions are opened with
# What Python makes of a manifest, a tokenizer or a template on top; and ONNX Runtime of a graph.
OTHERS = 128 << 20
SPACE = 2 << 30  # of addresses: a machine with many guests must not suffer from a failure
TEXT = "The fox said: 13 sheep and 42 goats.\n\n" * 8
FAILED = ("crash", "hang", "raised", "memory", "words")


@dataclass(frozen=True)
class Outcome:
    """kind: "works", "refused", or one of FAILED. growth: bytes of memory that the case took."""

    kind: str
    what: str = ""
    mutation: str = ""
    growth: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in FAILED


def use(folder: Path, mutation: str) -> None:
    """All that a person does with a bundle; for a model's file, what a build asks it first."""
    if mutation == "gguf":
        gguf_source.metadata(folder / "model.gguf")
        return
    saved = folder / "session.pot" if mutation == "saved" else None
    session = Session.open(folder, threads=1, saved=saved, max_bytes=MAX_BYTES)
    head, tail = (
        session.text.frame("Be brief.", "", "Who?") if session.text.has_template else "",
        "",
    )
    session.feed(session.text.encode("".join(head) + TEXT, trusted=False))
    session.feed("".join(tail) + "?")
    for _ in session.generate(max_new_tokens=4, sampling=Sampling(temperature=0.7, seed=1)):
        pass


def prepare(original: Path, folder: Path) -> Path:
    """A copy with the files that only a fuzzer wants: a saved session, and a model's file."""
    shutil.copytree(original, folder)
    process = os.fork()
    if not process:
        session = Session.open(folder, threads=1)
        session.feed(TEXT[:90])
        session.save(folder / "session.pot")
        os._exit(0)
    os.waitpid(process, 0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_token_list([f"token{n}" for n in range(40)])
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def case(originals: list[Path], seed: int) -> Outcome:
    """Make the bundle of a seed, and use it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=originals[0].parent) as room:
        folder = Path(room) / "b"
        folder.mkdir()
        mutation = made(originals[seed % len(originals)], folder, seed)
        return apart(lambda: use(folder, mutation), mutation, Path(room) / "said")


def made(original: Path, folder: Path, seed: int) -> str:
    """The bundle of a seed, made by a process of its own: absurd numbers take memory here, too."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            _limited_space()
            os.write(writing, bundles.make(original, folder, seed).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    mutation = os.read(reading, 1 << 10).decode()
    os.close(reading)
    os.waitpid(process, 0)
    if not mutation:
        raise RuntimeError(f"the bundle of seed {seed} could not be made")
    return mutation


def _limited_space() -> None:
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))


def apart(work: Callable[[], None], mutation: str, said: Path) -> Outcome:
    """Do it in a process of its own, whose words go to a file."""
    reading, writing = os.pipe()
    started = time.monotonic()
    process = os.fork()
    if not process:
        os.close(reading)
        _child(work, mutation, said, writing)
    os.close(writing)
    answered = bool(select.select([reading], [], [], MOST_WAIT)[0])
    told = os.read(reading, 1 << 20) if answered else b""
    os.close(reading)
    if not answered:
        os.kill(process, signal.SIGKILL)
    _, status, used = os.wait4(process, 0)
    seconds = used.ru_utime + used.ru_stime
    if not answered or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        waited = time.monotonic() - started
        return Outcome("hang", f"{seconds:.1f} s of {waited:.1f} s", mutation, seconds=seconds)
    if not told:
        what = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
        words = said.read_text(errors="replace")[-2000:] if said.exists() else ""
        return Outcome("crash", f"{what} {words}", mutation, seconds=seconds)
    return Outcome(**{**json.loads(told), "mutation": mutation, "seconds": seconds})


def _child(work: Callable[[], None], mutation: str, said: Path, writing: int) -> None:
    words = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    _limited_space()
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _memory("VmRSS")
    outcome = _tried(work)
    growth = _memory("VmHWM") - before
    if growth > MAX_BYTES + OTHERS and not outcome.failed:
        outcome = Outcome("memory", f"{growth >> 20} MiB; {outcome.what}")
    os.write(writing, json.dumps({**asdict(outcome), "growth": growth}).encode())
    os._exit(0)


def _tried(work: Callable[[], None]) -> Outcome:
    try:
        work()
    except PotexportError as error:
        what = str(error)
        if not what.isprintable() or len(what) > 2000:
            return Outcome("words", repr(what[:500]))
        return Outcome("refused", what[:300])
    except BaseException:
        return Outcome("raised", traceback.format_exc()[-3000:])
    return Outcome("works")


def _memory(name: str) -> int:
    """Bytes, of this process."""
    status = Path("/proc/self/status").read_text()
    (line,) = (each for each in status.splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


ort_capi._api()  # loads the library, for all cases; it starts no thread before a session is made
sys.setrecursionlimit(1000)
