"""The graphs on Qualcomm's HTP, compiled ahead of time: on a device, or on its emulator on x86.

Contexts are ONNX files with one EPContext node each and a binary beside them (`potexport.htp` makes
them). On x86 a context that shares its weights crashes the process that loads it, so the emulator
gets unshared ones; and whoever cannot afford a crash runs this in a process of its own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime import onnx_file
from potexport.runtime.backend import Array
from potexport.runtime.bound import BoundBackend, Loaded
from potexport.runtime.onnxruntime_backend import CONFIG
from potexport.runtime.ort_capi import SharedSessions
from potexport.runtime.tensors import map_weights

PROVIDER = "QNNExecutionProvider"
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class QnnBackend(BoundBackend):
    """The graphs of a bundle from contexts compiled for one chip; those that have none, from the
    bundle's own files on the CPU."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        contexts: Mapping[str, Path],
        *,
        embedding: str | None,
        shared: bool,
        threads: int,
    ) -> None:
        """
        Args:
            contexts: graph -> its file.
            embedding: the weight that ids are looked up in, where the contexts take its rows.
            shared: the contexts hold one copy of the weights together.
            threads: for graphs on the CPU.
        """
        if shared and emulated():
            raise PotexportError(
                "contexts that share their weights run on a device only; the emulator needs "
                "unshared ones"
            )
        weights = map_weights(Path(folder) / manifest.weights)
        files = {name: Path(folder) / f"{name}.onnx" for name in manifest.graphs} | dict(contexts)
        for name in files.keys() - contexts.keys():
            onnx_file.check(files[name], manifest.weights)
        runner = _Mixed(
            Contexts(list(contexts.values()), shared=shared),
            SharedSessions(threads=threads, weights=weights, config=CONFIG),
            frozenset(contexts.values()),
        )
        table = None if embedding is None else weights[embedding]
        super().__init__(manifest, runner, files, table=table)


class _Mixed:
    """Opens each graph where it belongs; see `runtime.bound.Runner`."""

    def __init__(self, npu: Contexts, cpu: SharedSessions, on_npu: frozenset[Path]) -> None:
        self._npu, self._cpu, self._on_npu = npu, cpu, on_npu

    def load(self, path: Path) -> Loaded:
        return self._npu.load(path) if path in self._on_npu else self._cpu.load(path)

    def drop_pages(self) -> None:
        self._cpu.drop_pages()  # of the table, the only one that is read

    def close(self) -> None:
        self._cpu.close()
        self._npu.close()


def qnn_devices() -> list[Any]:
    """ONNX Runtime's devices of the QNN provider, which is registered the first time.

    Raises PotexportError where the package onnxruntime-qnn is missing.
    """
    import onnxruntime

    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]
    if not devices:
        try:
            import onnxruntime_qnn
        except ModuleNotFoundError as error:
            raise PotexportError(
                "the NPU needs the package onnxruntime-qnn; install it with: pip install "
                "'potexport[qnn]'"
            ) from error
        onnxruntime.register_execution_provider_library(
            PROVIDER, onnxruntime_qnn.get_library_path()
        )
        devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]
    npu = onnxruntime.OrtHardwareDeviceType.NPU
    return [d for d in devices if d.device.type == npu] or devices  # x86 shows its CPU alone


class Contexts:
    """Opens contexts; see `runtime.bound.Runner`."""

    def __init__(self, files: list[Path], *, shared: bool) -> None:
        self._devices, self._last, self._shared = qnn_devices(), files[-1], shared

    def load(self, path: Path) -> Loaded:
        import onnxruntime

        if not path.is_file():
            raise PotexportError(f"{path} is missing; build the bundle again for this chip")
        options = onnxruntime.SessionOptions()
        # Without this, what the NPU cannot take runs on the CPU and nobody is told.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.log_severity_level = 3
        if self._shared:
            options.add_session_config_entry("ep.share_ep_contexts", "1")
            if path == self._last:
                options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        options.add_provider_for_devices(self._devices, {"backend_type": "htp"})
        try:
            return _Context(onnxruntime.InferenceSession(str(path), options))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise PotexportError(
                f"the NPU cannot load {path}: {str(error).splitlines()[0][:200]}; build the bundle "
                "again with the installed onnxruntime-qnn"
            ) from error

    def drop_pages(self) -> None:
        """The context owns its weights."""

    def close(self) -> None:
        """ONNX Runtime closes each session with its last reference."""


class _Context:
    """One graph; see `runtime.bound.Loaded`."""

    def __init__(self, session: Any) -> None:
        if session.get_providers()[0] != PROVIDER:
            raise PotexportError(f"ONNX Runtime runs a context on {session.get_providers()[0]}")
        self._session = session
        self.inputs = _declared(session.get_inputs())
        self.outputs = _declared(session.get_outputs())

    def binding(self) -> _Binding:
        return _Binding(self._session)


class _Binding:
    """ONNX Runtime's I/O binding over arrays of the host; see `runtime.bound.Binding`."""

    def __init__(self, session: Any) -> None:
        self._session, self._io = session, session.io_binding()
        self._arrays: list[Array] = []  # bound by address: they must outlive the binding

    def bind_input(self, name: str, array: Array) -> None:
        self._bind(self._io.bind_input, name, array)

    def bind_output(self, name: str, array: Array) -> None:
        self._bind(self._io.bind_output, name, array)

    def _bind(self, bind: Any, name: str, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        self._arrays.append(array)
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._io)


def _declared(arguments: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape); -1 for what is not constant, so that no contract matches it."""
    return {
        each.name: (
            DTYPES.get(each.type, each.type),
            tuple(d if isinstance(d, int) else -1 for d in each.shape),
        )
        for each in arguments
    }


def emulated() -> bool:
    """Whether the NPU is Qualcomm's emulator here."""
    return platform.machine() in ("x86_64", "AMD64")
