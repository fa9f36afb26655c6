"""The `.pte` on disk: what it holds twice is stored once, and it is read back and checked.

A `.pte` is a header, a flatbuffer, and segments behind it (ExecuTorch, `schema/program.fbs` and
`runtime/executor/program.cpp`). A tied model has its embedding as a constant, for ExecuTorch's own
lookup, and the same bytes again as the head's weight, for the delegate. Nothing forbids two
segments to overlap, so the second becomes a view of the first.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any, BinaryIO

from potexport.errors import PotexportError
from potexport.spec import GraphSpec

PROGRAM = "model.pte"
# At byte 8 of the file: magic, length of the header, of flatbuffer and header, where segments
# begin, and their bytes.
HEADER = struct.Struct("<4sIQQQ")
HEADER_AT = 8
# Fields of the table Program, and widths of numbers in bytes.
SEGMENTS, CONSTANT_SEGMENT, NAMED_DATA = 4, 5, 7
WORD, LONG = 4, 8
ALIGNMENT = 128  # of segments, ExecuTorch's own
PIECE = 16 << 20
WORTHWHILE = 1 << 12  # bytes; below, a second copy costs nothing


@dataclass
class _Segment:
    """A segment of the file, in bytes from where segments begin. field: where the flatbuffer
    has its offset; 0 where it has none."""

    offset: int
    size: int
    field: int


def share_bytes(path: Path) -> int:
    """Let delegates' weights that are constants of the program as well be read from there.

    The file is replaced by the shorter one. Returns the bytes saved.
    """
    temporary = path.with_name(f".{path.name}.sharing")
    with path.open("rb") as file:
        magic, _, program_size, base, _ = HEADER.unpack_from(file.read(64), HEADER_AT)
        if magic != b"eh00":
            raise RuntimeError(f"{path.name} has no extended header, or one of another version")
        file.seek(0)
        program = bytearray(file.read(program_size))
        segments, constants, named = _read(program)
        data = _Data(file, base)
        twins: dict[int, int] = {}
        for index in named:
            found = _twin(data, segments[index], constants)
            if found is not None:
                twins[index] = found
        saved = sum(segments[index].size for index in twins)
        if saved:
            _write(temporary, program, data, segments, twins)
    if saved:
        shutil.copymode(path, temporary)
        temporary.replace(path)  # which is closed: Windows replaces no open file
    return saved


@dataclass(frozen=True)
class _Data:
    """What lies behind the flatbuffer; read and not mapped, for what is mapped stays resident."""

    file: BinaryIO
    base: int

    def pieces(self, offset: int, size: int) -> Iterator[bytes]:
        for at in range(0, size, PIECE):
            self.file.seek(self.base + offset + at)
            yield self.file.read(min(PIECE, size - at))


def _read(program: bytearray) -> tuple[list[_Segment], list[tuple[int, int]], set[int]]:
    """All segments; (offset, extent) of each constant; the segments that delegates name."""
    root = _Table.root(program)
    segments = [
        _Segment(each.number(0), each.number(1), each.place(0) or 0)
        for each in root.tables(SEGMENTS)
    ]
    named = {each.number(1, WORD) for each in root.tables(NAMED_DATA)}
    constant = root.table(CONSTANT_SEGMENT)
    if constant is None:
        return segments, [], named
    whole = segments[constant.number(0, WORD)]
    starts = sorted(set(constant.numbers(1)))
    pairs = zip(starts, [*starts[1:], whole.size], strict=True)
    return segments, [(whole.offset + a, b - a) for a, b in pairs], named


class _Table:
    """A table of a flatbuffer, its fields by their number in `schema/program.fbs`."""

    def __init__(self, buffer: bytearray, place: int) -> None:
        from flatbuffers.table import Table

        self._table: Any = Table(buffer, place)

    @classmethod
    def root(cls, buffer: bytearray) -> _Table:
        return cls(buffer, int.from_bytes(buffer[:4], "little"))

    def place(self, field: int) -> int | None:
        """Where a field's value is, None where it is left out."""
        offset: int = self._table.Offset(4 + 2 * field)
        return self._table.Pos + offset if offset else None

    def number(self, field: int, width: int = LONG) -> int:
        place = self.place(field)
        bytes_ = b"" if place is None else self._table.Bytes[place : place + width]
        return int.from_bytes(bytes_, "little")

    def table(self, field: int) -> _Table | None:
        place = self.place(field)
        return None if place is None else _Table(self._table.Bytes, self._table.Indirect(place))

    def tables(self, field: int) -> list[_Table]:
        return [
            _Table(self._table.Bytes, self._table.Indirect(place))
            for place in self._elements(field, WORD)
        ]

    def numbers(self, field: int) -> list[int]:
        places = self._elements(field, LONG)
        return [int.from_bytes(self._table.Bytes[at : at + LONG], "little") for at in places]

    def _elements(self, field: int, width: int) -> range:
        place = self.place(field)
        if place is None:
            return range(0)
        offset = place - self._table.Pos
        first, count = self._table.Vector(offset), self._table.VectorLen(offset)
        return range(first, first + width * count, width)


def _twin(data: _Data, segment: _Segment, constants: list[tuple[int, int]]) -> int | None:
    """Where else these bytes are; None if nowhere, or not worth it."""
    if segment.size < WORTHWHILE:
        return None
    for offset, extent in constants:
        if segment.size <= extent < segment.size + ALIGNMENT:
            own = data.pieces(segment.offset, segment.size)
            if all(map(eq, own, data.pieces(offset, segment.size))):
                return offset
    return None


def _write(
    path: Path,
    program: bytearray,
    data: _Data,
    segments: list[_Segment],
    twins: Mapping[int, int],
) -> None:
    """To `path`, the program without the segments of `twins`, whose offsets point into another
    segment."""
    kept = [index for index in range(len(segments)) if index not in twins]
    places, end = {}, 0
    for index in sorted(kept, key=lambda i: segments[i].offset):
        places[index] = end
        end = -(-(end + segments[index].size) // ALIGNMENT) * ALIGNMENT
    for index, wanted in twins.items():
        home = next(
            i for i in kept if segments[i].offset <= wanted < segments[i].offset + segments[i].size
        )
        places[index] = places[home] + wanted - segments[home].offset
    for index, segment in enumerate(segments):
        if segment.field:
            struct.pack_into("<Q", program, segment.field, places[index])
        elif places[index]:
            raise RuntimeError(f"segment {index} stores no offset to change")
    size = max(places[i] + segments[i].size for i in kept)
    begin = HEADER.unpack_from(program, HEADER_AT)
    HEADER.pack_into(program, HEADER_AT, *begin[:4], size)
    with path.open("wb") as file:
        file.write(program)
        for index in kept:
            file.seek(data.base + places[index])
            for piece in data.pieces(segments[index].offset, segments[index].size):
                file.write(piece)


def check(path: Path, graphs: Mapping[str, GraphSpec]) -> None:
    """Read the program back by ExecuTorch's own runtime and hold it against the contract."""
    from potexport.runtime.executorch_backend import open_program, signature

    program = open_program(path)
    for name, spec in graphs.items():
        inputs, outputs = signature(program, name, spec)
        for tensor in (*spec.inputs, *spec.outputs):
            found = {**inputs, **outputs}.get(tensor.name)
            if found != (tensor.dtype, tensor.shape):
                raise PotexportError(
                    f"method {name} of {path.name} came out with {found} for {tensor}; report it"
                )
