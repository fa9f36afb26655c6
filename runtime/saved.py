"""A session in a file: what it holds of a text, written whole or not at all, for its bundle alone.

The file is a safetensors file. Its tensors are the filled part of the pot, by the names of the
contract, with the tokens and logits that wait; its metadata, `FACTS`, is the rest in JSON, and a
SHA-256 of that and of the data. Nothing is allocated for a file before its size was held against
the bundle's pot, and no number of it reaches a graph before it was looked at.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np

from potexport.bundle import KEY_FILES, Manifest
from potexport.errors import PotexportError
from potexport.runtime import keeping
from potexport.runtime.backend import Array
from potexport.runtime.ids import token_ids
from potexport.runtime.pot import Contents, Pot
from potexport.runtime.records import Settings, State, Stats
from potexport.runtime.said import Said
from potexport.runtime.tensors import METADATA, Entries, arrays, entries, header
from potexport.spec import TensorSpec

FORMAT = 2
FACTS, DIGEST = "potexport", "sha256"  # what the metadata has
LARGEST_HEADER = 16 << 20  # bytes; a hundred layers take some hundred thousand
MOST_PENDING = 1 << 24  # tokens
MOST_SAID = 1 << 28  # bytes of a conversation
LOGITS, SAID = "logits", "conversation"
IDS = ("pending", "tail", "catalyst")


class _BrokenError(Exception):
    """What is wrong with a file that is none of ours, or was one."""


# What is raised for what is of another type, or out of range.
WRONG = (_BrokenError, PotexportError, KeyError, TypeError, ValueError, OverflowError)
OUTSIDE = "its numbers are none that a session has"


def write_session(
    path: str | os.PathLike[str], manifest: Manifest, state: State, settings: Settings
) -> None:
    """Write a session to a file beside it, which then takes its place.

    Raises PotexportError where there is a file that is no saved session, or none can be written.
    """
    tensors = {**state.pot.arrays, "pending": state.pending, "tail": state.tail}
    tensors["catalyst"] = settings.catalyst
    if state.last is not None:
        tensors[LOGITS] = state.last
    if state.said is not None:
        tensors[SAID] = np.frombuffer(state.said.to_bytes(), np.uint8)
    facts = {
        "format": FORMAT,
        "bundle": identity(manifest),
        "policy": settings.policy,
        "keep": settings.keep if settings.keep == "auto" else int(settings.keep),
        "keep_mass": float(settings.keep_mass),
        "asked": settings.asked,
        "fills": state.pot.fills.tolist(),
        "position": state.pot.position,
        "pinned": state.pot.pinned,
        "fed": state.fed,
        "novelty": state.novelty,
        "to_come": state.to_come,
        "stats": asdict(state.stats),
        "note": settings.note,
    }
    table = entries(TensorSpec(name, a.dtype.name, a.shape) for name, a in tensors.items())
    said = json.dumps(facts)
    data = [np.ascontiguousarray(tensors[name]) for name in table]
    digest = _sha256(said, data)
    begin = header(table, {FACTS: said, DIGEST: digest})
    check_place(path)
    try:
        _replace(Path(path), [begin, *data])
    except OSError as error:
        raise PotexportError(
            f"cannot write the session to {path}: {error.strerror}; choose another place"
        ) from error


def check_place(path: str | os.PathLike[str]) -> None:
    """PotexportError where a session could not be saved, before minutes of reading."""
    where = Path(path)
    if where.exists() and not _is_ours(where):
        raise PotexportError(
            f"{path} exists and is no saved session, so it is not replaced; choose another name"
        )
    if not where.parent.is_dir():
        raise PotexportError(f"{path} cannot be saved: there is no folder {where.parent}; make it")


def _replace(path: Path, parts: list[Any]) -> None:
    _sweep(path.parent, path.name)
    beside = path.parent / f".{path.name}.saving-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with beside.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())  # before it takes the name of one that is whole
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _sweep(folder: Path, name: str) -> None:
    """Remove what processes left that were killed as they saved to this file, where the system
    tells which run."""
    if not Path("/proc/self").exists():
        return
    for left in folder.glob(f".{glob.escape(name)}.saving-*-*"):
        process = left.name.rsplit("-", 2)[1]
        if process.isdigit() and not Path("/proc", process).exists():
            left.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether the file is a saved session, of whatever bundle or format, or empty."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == 0 or FACTS in _header(file)[METADATA]
    except (_BrokenError, OSError):
        return False


def identity(manifest: Manifest) -> str:
    """What tells a bundle from any other that a saved session does not fit: graphs, weights,
    tokenizer and sizes, by the digests of its manifest."""
    names = {manifest.weights, "tokenizer.json", *map(manifest.file_of, manifest.graphs)}
    names |= set(KEY_FILES) if manifest.layout.coding else set()
    digests = {name: manifest.files[name].sha256 for name in sorted(names)}
    known = [digests, asdict(manifest.model), asdict(manifest.pot), manifest.pot_dtype]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def policy_of(path: str | os.PathLike[str], manifest: Manifest) -> str:
    """The label of the policy that a session was saved with. PotexportError for a file that is no
    session of this bundle, as far as its header tells."""
    with _opened(path) as file:
        policy = _facts(path, _header_of(path, file), manifest).get("policy")
    if policy not in [each.label for each in manifest.policies]:
        raise _damaged(path, OUTSIDE)
    return str(policy)


def read_session(
    path: str | os.PathLike[str], manifest: Manifest, pot: Pot
) -> tuple[State, Settings]:
    """What `write_session` wrote for the same bundle. The pot says what there is to be read, and
    stays as it is.

    Raises PotexportError for a file that is missing, damaged, of another bundle or a newer format.
    """
    with _opened(path) as file:
        found = _header_of(path, file)
        facts = _facts(path, found, manifest)
        try:
            return _Reader(manifest, pot, facts, found).read(file)
        except WRONG as error:
            raise _damaged(path, error if isinstance(error, _BrokenError) else OUTSIDE) from error


def _damaged(path: str | os.PathLike[str], why: object) -> PotexportError:
    return PotexportError(f"the saved session {path} is damaged: {why}; save it again")


def _opened(path: str | os.PathLike[str]) -> BufferedReader:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never open
            raise PotexportError(f"{path} cannot be read: it is no file")
        return Path(path).open("rb")
    except OSError as error:
        raise PotexportError(f"{path} cannot be read: {error.strerror}") from error


def _header(file: BufferedReader) -> dict[str, Any]:
    """Of a safetensors file with metadata."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LARGEST_HEADER):
        raise _BrokenError
    try:
        found = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _BrokenError from error
    if not isinstance(found, dict) or not isinstance(found.get(METADATA), dict):
        raise _BrokenError
    return found


def _header_of(path: str | os.PathLike[str], file: BufferedReader) -> dict[str, Any]:
    try:
        found = _header(file)
    except _BrokenError:
        found = {METADATA: {}}
    if not isinstance(found[METADATA].get(FACTS), str):
        raise PotexportError(
            f"{path} is no saved session, or is cut short; give a file that `run --save` or "
            "Session.save wrote"
        )
    return found


def _facts(
    path: str | os.PathLike[str], found: Mapping[str, Any], manifest: Manifest
) -> dict[str, Any]:
    """What the metadata says, if it is of this format and bundle."""
    try:
        facts = json.loads(found[METADATA][FACTS])
        version, bundle = facts["format"], facts["bundle"]
        if type(version) is not int or version < 1:
            raise ValueError
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise PotexportError(
            f"the saved session {path} is damaged: {OUTSIDE}; save it again"
        ) from error
    if version < FORMAT:
        raise PotexportError(
            f"the saved session {path} has format {version}, older than the {FORMAT} that this "
            "potexport reads; read the text again"
        )
    if version > FORMAT:
        raise PotexportError(
            f"the saved session {path} has format {version}, newer than the {FORMAT} that this "
            "potexport reads; update potexport (pip install -U potexport)"
        )
    if bundle != identity(manifest):
        raise PotexportError(
            f"the session {path} was saved with another bundle; open it with that one, or read "
            "the text again with this one"
        )
    assert isinstance(facts, dict)
    return facts


@dataclass(frozen=True)
class _Reader:
    """Raises _BrokenError, or what Python raises of wrong types, where anything is otherwise than
    it must be."""

    manifest: Manifest
    pot: Pot
    facts: Mapping[str, Any]
    found: Mapping[str, Any]

    def read(self, file: BufferedReader) -> tuple[State, Settings]:
        facts = self.facts
        fills = self._fills()
        views = self.pot.views(fills)
        table = self._table(views)
        made = self._data(file, table)
        filled = min(self.pot.counts_of(fills))
        pinned = _whole(facts["pinned"], most=filled + made["pending"].size)
        arrays_of = {name: made[name] for name in views}
        contents = Contents(fills, _whole(facts["position"]), arrays_of, pinned)
        self._check(contents, made["tail"])
        state = State(
            contents,
            self._ids(made["pending"]),
            _whole(facts["fed"], most=made["pending"].size),
            _number(facts["novelty"]),
            made.get(LOGITS),
            None if facts["to_come"] is None else int(_number(facts["to_come"])),
            self._ids(made["tail"]),
            _stats(facts["stats"]),
            Said.from_bytes(made[SAID].tobytes()) if SAID in made else None,
        )
        return state, self._settings(made["catalyst"], pinned)

    def _fills(self) -> Array:
        wanted = self.pot.sizes
        given = [_whole(fill) for fill in self.facts["fills"]]
        if any(fill > most for fill, most in zip(given, wanted.tolist(), strict=True)):
            raise _BrokenError(OUTSIDE)
        return np.array(given, np.int32)

    def _table(self, views: Mapping[str, Array]) -> Entries:
        """What the header must have, and has."""
        wanted = [TensorSpec(name, view.dtype.name, view.shape) for name, view in views.items()]
        width = self.manifest.pot.catalyst_width
        for name in IDS:
            (length,) = self.found[name]["shape"]
            most = MOST_PENDING if name == "pending" else width
            wanted.append(TensorSpec(name, "int32", (_whole(length, most=most),)))
        if SAID in self.found:
            (length,) = self.found[SAID]["shape"]
            wanted.append(TensorSpec(SAID, "uint8", (_whole(length, most=MOST_SAID),)))
        if LOGITS in self.found:
            wanted.append(TensorSpec(LOGITS, "float32", (self.manifest.model.vocab_size,)))
        table = entries(wanted)
        if {METADATA: self.found[METADATA], **table} != self.found:
            raise _BrokenError("its header does not fit the bundle's pot")
        return table

    def _data(self, file: BufferedReader, table: Entries) -> dict[str, Array]:
        size = max(entry["data_offsets"][1] for entry in table.values())
        left = os.fstat(file.fileno()).st_size - file.tell()
        if left != size:
            raise _BrokenError("it is cut short" if left < size else "it is longer than it says")
        data = np.empty(size, np.uint8)
        if file.readinto(data.data) != size:
            raise _BrokenError("it is cut short")
        if _sha256(self.found[METADATA][FACTS], [data]) != self.found[METADATA].get(DIGEST):
            raise _BrokenError("its SHA-256 is another")
        return arrays(table, data)

    def _check(self, contents: Contents, tail: Array) -> None:
        """No graph is given a number that is none, nor a position that its tables do not have."""
        for name, array in contents.arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise _BrokenError(f"{name} has numbers that are not finite")
            if name.startswith("positions."):
                stands = np.diff(array, axis=1, prepend=-1, append=contents.position)
                if stands.min() < 1:
                    raise _BrokenError(f"{name} is out of order")
        geometry = self.manifest.pot
        room = min(self.pot.counts_of(self.pot.sizes - contents.fills))
        end = contents.position + room + geometry.widest
        if end > geometry.positions or tail.size > contents.position:
            raise _BrokenError(OUTSIDE)

    def _ids(self, ids: Array) -> Array:
        return token_ids(ids, self.manifest.model.vocab_size)

    def _settings(self, catalyst: Array, pinned: int) -> Settings:
        facts = self.facts
        keep: int | Literal["auto"] = "auto"
        if facts["keep"] != "auto":
            keep = _whole(facts["keep"])
        share, asked = _number(facts["keep_mass"]), bool(facts["asked"])
        policy = self.manifest.policy_of(facts["policy"])
        keeping.check(self.manifest.pot, policy, keep, share, pinned)
        return Settings(policy.label, keep, share, asked, self._ids(catalyst), str(facts["note"]))


def _sha256(said: str, data: list[Array]) -> str:
    digest = hashlib.sha256(said.encode())
    for array in data:
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()


def _stats(given: Mapping[str, Any]) -> Stats:
    kinds = {name: type(each) for name, each in asdict(Stats()).items()}
    if set(given) != set(kinds):
        raise _BrokenError(OUTSIDE)
    found: dict[str, Any] = {
        name: _whole(each) if kinds[name] is int else _number(each) for name, each in given.items()
    }
    return Stats(**found)


def _whole(given: Any, *, most: int = 1 << 62) -> int:
    if type(given) is not int or not 0 <= given <= most:
        raise _BrokenError(OUTSIDE)
    return given


def _number(given: Any) -> float:
    if type(given) not in (int, float) or not math.isfinite(given):
        raise _BrokenError(OUTSIDE)
    return float(given)
