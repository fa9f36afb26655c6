"""Several ONNX Runtime sessions over one set of weights, packed once.

Graphs of a model differ in width but not in weights, yet each session packs the weights of its
matrix products for itself. ONNX Runtime can share what is packed, but only through its C API,
which the wheel carries beside the Python binding, in `capi/libonnxruntime.so.*`.

This file decides who owns which native handle, what memory sessions share, and when pages of the
weights file go back to the system; not which graphs there are, nor what is bound to them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from potexport.errors import PotexportError

Array = npt.NDArray[Any]

# Argument types -> name -> index in the struct OrtApi, an append-only table of function pointers:
# an index, once released, stays (these are of ONNX Runtime 1.9). To derive them again, count the
# struct's members in onnxruntime_c_api.h from 0, ORT_CLASS_RELEASE(X) as ReleaseX; control:
# ReleaseCustomOpDomain is 101. All but GetErrorMessage and Release* return a status, null if good.
_FUNCTIONS: Final = {
    "p": {
        "GetErrorMessage": 2, "CreateSessionOptions": 10, "DisableMemPattern": 17,
        "GetAllocatorWithDefaultOptions": 78, "ReleaseStatus": 93, "ReleaseSession": 95,
        "ReleaseValue": 96, "ReleaseTypeInfo": 98, "ReleaseSessionOptions": 100,
        "ReleaseIoBinding": 135, "ReleaseArenaCfg": 157, "CreatePrepackedWeightsContainer": 166,
        "ReleasePrepackedWeightsContainer": 167},
    "pp": {
        "SessionGetInputCount": 30, "SessionGetOutputCount": 31, "CastTypeInfoToTensorInfo": 55,
        "GetTensorElementType": 60, "GetDimensionsCount": 61, "AllocatorFree": 76,
        "CreateIoBinding": 134, "UnregisterAllocator": 177},
    "ppp": {
        "AddSessionConfigEntry": 130, "RunWithBinding": 133, "BindInput": 136, "BindOutput": 137,
        "CreateAndRegisterAllocator": 144, "AddInitializer": 150},
    "pi": {"SetIntraOpNumThreads": 24}, "ipp": {"CreateEnv": 3}, "ppz": {"GetDimensions": 62},
    "iip": {"CreateCpuMemoryInfo": 69}, "ziiip": {"CreateArenaCfg": 156},
    "ppzpzip": {"CreateTensorWithDataAsOrtValue": 49},
    "pzp": {"SessionGetInputTypeInfo": 33, "SessionGetOutputTypeInfo": 34},
    "pzpp": {"SessionGetInputName": 36, "SessionGetOutputName": 37},
    "ppppp": {"CreateSessionWithPrepackedWeightsContainer": 168},
}  # fmt: skip
_LETTERS: Final = {"p": ctypes.c_void_p, "i": ctypes.c_int, "z": ctypes.c_size_t}
# numpy's name -> ONNX's TensorProto.DataType
_ELEMENT_TYPES: Final = dict(
    float32=1, uint8=2, int8=3, uint16=4, int32=6, int64=7, bool=9, float16=10
)
_API_VERSION, _LOG_FATAL, _ARENA_ALLOCATOR, _DEFAULT_MEMORY = 9, 4, 1, 0  # as in the header
_DROP_PERIOD: Final = 0.005  # seconds; packing touches some 10 MB of the file in that time


class OrtCError(RuntimeError):
    """ONNX Runtime, or a check made before calling it, refused; the message says why."""


class TensorSpec(NamedTuple):
    """An input or output as the graph declares it; -1 is a dimension left open: not supported."""

    dtype: str
    shape: tuple[int, ...]


class _Api:
    """The C functions, typed, with a bad status raised as OrtCError."""

    def __init__(self) -> None:
        entry = ctypes.CDLL(_library()).OrtGetApiBase
        entry.restype = ctypes.POINTER(ctypes.c_void_p * 2)  # GetApi, GetVersionString
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(entry().contents[0])
        table = ctypes.cast(get_api(_API_VERSION), ctypes.POINTER(ctypes.c_void_p))
        self._functions = {}
        for letters, functions in _FUNCTIONS.items():
            types = [_LETTERS[letter] for letter in letters]
            for name, index in functions.items():
                result = None if name.startswith("Release") else ctypes.c_void_p
                self._functions[name] = ctypes.CFUNCTYPE(result, *types)(table[index] or 0)
        # For the life of the process, as ONNX Runtime has it.
        self.memory = self.get("CreateCpuMemoryInfo", _ARENA_ALLOCATOR, _DEFAULT_MEMORY)
        self.env = self.get("CreateEnv", _LOG_FATAL, b"potexport")  # errors are raised
        self.arena = _Arena(self)

    def call(self, name: str, *args: Any) -> None:
        status = self._functions[name](*args)
        if status:
            message = ctypes.string_at(self._functions["GetErrorMessage"](status))
            self._functions["ReleaseStatus"](status)
            raise OrtCError(message.decode(errors="replace"))

    def get(self, name: str, *args: Any, kind: type[Any] = ctypes.c_void_p) -> int:
        """What a function writes to its last argument."""
        value = kind()
        self.call(name, *args, ctypes.byref(value))
        return int(value.value)

    def own(self, stack: ExitStack, kind: str, name: str, *args: Any) -> int:
        """A new handle, which the stack releases."""
        handle = self.get(name, *args)
        stack.callback(self._functions[f"Release{kind}"], handle)
        return handle


class _Arena:
    """Scratch memory: one arena for all sessions that share weights, since they run in turns; with
    one each, three of width 64 held 160 MB more. The environment has one at a time, which sessions
    made in the meantime take and keep."""

    def __init__(self, api: _Api) -> None:
        self._api, self._owner = api, object()
        self.lock = threading.Lock()

    def take(self, owner: object, most: int | None) -> None:
        """Let sessions made from now on share `owner`'s, of `most` bytes; the lock is held."""
        if self._owner is owner:
            return
        with suppress(OrtCError):  # the first time there is none
            self._api.call("UnregisterAllocator", self._api.env, self._api.memory)
        with ExitStack() as local:
            config = (most or 0, *[-1] * 3)  # 0, -1: ONNX Runtime's own choice
            arena = self._api.own(local, "ArenaCfg", "CreateArenaCfg", *config)
            self._api.call("CreateAndRegisterAllocator", self._api.env, self._api.memory, arena)
        self._owner = owner


def _library() -> str:
    spec = importlib.util.find_spec("onnxruntime")  # finds, does not import
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(place, "capi").glob("*onnxruntime.*"):  # .so.1.32.0, .1.32.0.dylib, .dll
            return str(path)
    raise OrtCError("no onnxruntime library among the packages; try: pip install onnxruntime")


_api = functools.cache(_Api)


class _Closable:
    """An object with native handles, all released by one stack.

    The stack does not know the object, so a finalizer may hold it, and the parent's stack closes
    it too: in whatever order objects die, what depends on a handle is released before it.
    """

    def __init__(self, parent: _Closable | None = None) -> None:
        self._parent = parent  # alive: native values point into its arrays
        self._stack, self._open = ExitStack(), [True]
        self._stack.callback(self._open.clear)
        weakref.finalize(self, self._stack.close)
        if parent is not None:
            parent._require_open()
            parent._stack.callback(self._stack.close)

    def _require_open(self) -> None:
        if not self._open:
            raise OrtCError(f"this {type(self).__name__} is closed")

    def close(self) -> None:
        """Release this and what was made from it; not while it runs. Twice does no harm."""
        self._stack.close()


class SharedSessions(_Closable):
    """Sessions that share weights, what is packed of them, and scratch memory.

    Args:
        threads: threads of a run, the calling one included.
        weights: initializer name -> C-contiguous array, best a view of a read-only np.memmap:
            what gets packed is copied, and the file's pages are given back once read.
        config: session config entries, e.g. {"session.intra_op.allow_spinning": "0"}.
        scratch: bytes of memory that runs may take besides what is bound; no limit by default.
    """

    def __init__(
        self,
        *,
        threads: int,
        weights: Mapping[str, Array],
        config: Mapping[str, str] | None = None,
        scratch: int | None = None,
    ) -> None:
        super().__init__()
        self._threads, self._weights = threads, dict(weights)  # native values point into these
        self._scratch, self._owner = scratch, object()
        mappings = (_mapping(array) for array in self._weights.values())
        self._mappings = list({id(each): each for each in mappings if each is not None}.values())
        self._config = {"session.use_env_allocators": "1", **(config or {})}
        create = "CreatePrepackedWeightsContainer"
        self._container = _api().own(self._stack, "PrepackedWeightsContainer", create)
        self._values = {n: _value_over(self._stack, n, array) for n, array in weights.items()}

    def load(self, graph: str | os.PathLike[str], names: Iterable[str] | None = None) -> CSession:
        """Open a graph file; `names` are the weights it has, by default all that were given."""
        self._require_open()
        api, path = _api(), os.fspath(graph)
        with ExitStack() as local:
            options = api.own(local, "SessionOptions", "CreateSessionOptions")
            api.call("SetIntraOpNumThreads", options, self._threads)
            api.call("DisableMemPattern", options)  # its plan would be one more block, as large
            for key, text in self._config.items():
                api.call("AddSessionConfigEntry", options, key.encode(), text.encode())
            for name in self._values if names is None else names:
                if name not in self._values:
                    raise OrtCError(f"{path}: no weight {name!r} among those given")
                api.call("AddInitializer", options, name.encode(), self._values[name])
            local.enter_context(_dropping_pages(self._mappings))
            local.enter_context(api.arena.lock)
            api.arena.take(self._owner, self._scratch)
            return CSession(self, path, options)

    def drop_pages(self) -> None:
        """Give back what steps have read of the weights file: it comes again from the cache."""
        _drop(self._mappings)


class CSession(_Closable):
    """One graph, made by `SharedSessions.load`; `binding()` gives it arrays to work on."""

    def __init__(self, shared: SharedSessions, path: str, options: int) -> None:
        super().__init__(shared)
        native = path if os.name == "nt" else os.fsencode(path)  # wide characters there
        create = "CreateSessionWithPrepackedWeightsContainer"
        args = (_api().env, native, options, shared._container)
        self._handle = _api().own(self._stack, "Session", create, *args)
        self.inputs = dict(_specs(self._handle, "Input"))
        self.outputs = dict(_specs(self._handle, "Output"))

    def binding(self) -> Binding:
        """A new, empty set of bound arrays, independent of the others."""
        return Binding(self)


class Binding(_Closable):
    """Arrays that a session reads and writes in place; made by `CSession.binding`."""

    def __init__(self, session: CSession) -> None:
        super().__init__(session)
        self._specs = {"BindInput": session.inputs, "BindOutput": session.outputs}
        self._arrays: dict[str, Array] = {}
        self._handle = _api().own(self._stack, "IoBinding", "CreateIoBinding", session._handle)
        self._run_args = (session._handle, None, self._handle)

    def bind_input(self, name: str, array: Array) -> None:
        """Read input `name` from this memory at every run, until bound anew."""
        self._bind("BindInput", name, array)

    def bind_output(self, name: str, array: Array) -> None:
        """Write output `name` to this memory at every run; an output not bound is not kept."""
        if not array.flags.writeable:
            raise OrtCError(f"BindOutput {name!r}: the array is read-only")
        self._bind("BindOutput", name, array)

    def _bind(self, call: str, name: str, array: Array) -> None:
        self._require_open()
        if (spec := self._specs[call].get(name)) is None:
            raise OrtCError(f"{call} {name!r}: the graph has {', '.join(self._specs[call])}")
        if (given := TensorSpec(array.dtype.name, array.shape)) != spec:
            raise OrtCError(f"{call} {name!r}: {given} given, {spec} expected")
        with ExitStack() as local:  # the binding takes its own share of the value, not the array
            _api().call(call, self._handle, name.encode(), _value_over(local, name, array))
        self._arrays[call + name] = array

    def run(self) -> None:
        """One step, from the bound inputs to the bound outputs. PotexportError where the graph
        cannot go on, such as for want of memory."""
        self._require_open()
        try:
            _api().call("RunWithBinding", *self._run_args)
        except OrtCError as error:
            raise PotexportError(
                f"ONNX Runtime stopped within a graph: {str(error).splitlines()[0][:300]}"
            ) from error


def _value_over(stack: ExitStack, name: str, array: Array) -> int:
    """An OrtValue over the array's memory, which the caller keeps alive."""
    element, flags = _ELEMENT_TYPES.get(array.dtype.name), array.flags
    if element is None or not (flags.c_contiguous and flags.aligned and array.dtype.isnative):
        wanted = f"C-contiguous, aligned, and of {', '.join(_ELEMENT_TYPES)}"
        raise OrtCError(f"{name!r}: the {array.dtype} array must be {wanted}")
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    args = (_api().memory, array.ctypes.data, array.nbytes, shape, array.ndim, element)
    return _api().own(stack, "Value", "CreateTensorWithDataAsOrtValue", *args)


def _specs(session: int, kind: str) -> Iterator[tuple[str, TensorSpec]]:
    """The declared inputs or outputs (`kind` is Input or Output), in the graph's order."""
    api, names = _api(), {number: name for name, number in _ELEMENT_TYPES.items()}
    allocator = api.get("GetAllocatorWithDefaultOptions")  # not ours to release
    for index in range(api.get(f"SessionGet{kind}Count", session, kind=ctypes.c_size_t)):
        text = api.get(f"SessionGet{kind}Name", session, index, allocator)
        name = ctypes.string_at(text).decode()
        api.call("AllocatorFree", allocator, text)
        with ExitStack() as local:
            info = api.own(local, "TypeInfo", f"SessionGet{kind}TypeInfo", session, index)
            tensor = api.get("CastTypeInfoToTensorInfo", info)  # part of info
            rank = api.get("GetDimensionsCount", tensor, kind=ctypes.c_size_t)
            shape = (ctypes.c_int64 * rank)()
            api.call("GetDimensions", tensor, shape, rank)
            element = api.get("GetTensorElementType", tensor, kind=ctypes.c_int)
        yield name, TensorSpec(names.get(element, f"onnx type {element}"), tuple(shape))


def _mapping(array: Array) -> mmap.mmap | None:
    """The file behind an array, if dropped pages come back as they were (else they may not)."""
    base, safe = cast(object, array), False
    while isinstance(base, np.ndarray):
        safe = safe or (isinstance(base, np.memmap) and base.mode == "r")
        base = base.base
    return base if safe and isinstance(base, mmap.mmap) else None


def _drop(mappings: Iterable[mmap.mmap]) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no madvise
        for each in mappings:
            each.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _dropping_pages(mappings: Iterable[mmap.mmap]) -> Iterator[None]:
    """Give pages of the weights file back to the system while the block reads them, and after.

    Packing reads the whole file, which would count as resident beside its packed copy. Pages stay
    in the page cache and are mapped again when read again, so dropping them is always safe.
    """
    done = threading.Event()

    def keep_dropping() -> None:
        while not done.wait(_DROP_PERIOD):
            _drop(mappings)
        _drop(mappings)

    thread = threading.Thread(target=keep_dropping, name="drop-weight-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
