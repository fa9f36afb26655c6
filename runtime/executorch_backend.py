"""The graphs in ExecuTorch: methods of one program.

ExecuTorch's Python binding is made on torch's: importing it imports torch, and tensors are what it
takes. Nothing here computes with torch; an app drives the same program from C++, Kotlin or Swift,
where there is none. The pot's arrays are the methods' inputs as they are, without a copy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.backend import Array
from potexport.runtime.bound import BoundBackend
from potexport.runtime.coded_pot import read_key_facts
from potexport.runtime.executorch_options import compute_in_fp32, share_packed_weights
from potexport.runtime.quiet import quietly
from potexport.spec import GraphSpec

Signature = Mapping[str, tuple[str, tuple[int, ...]]]
# The numbers of torch's scalar types, `runtime/core/portable_type/scalar_type.h`.
TYPES = {1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32"}


class ExecutorchBackend(BoundBackend):
    """Graphs of a bundle, as methods of its program."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        graphs: Sequence[str],
        *,
        threads: int,
    ) -> None:
        assert manifest.program is not None
        path = Path(folder) / manifest.weights
        compute_in_fp32(manifest.program.delegate)  # OpenVINO reads it as it is loaded
        _require(manifest)
        methods = {name: path / name for name in graphs}
        key_facts = read_key_facts(folder, manifest.layout)
        super().__init__(manifest, _Program(path, manifest, threads), methods, key_facts=key_facts)


class _Program:
    """A `bound.Runner`. What it loads is called program/method."""

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        self._path, self._manifest = path, manifest
        binding().set_threads(threads)
        share_packed_weights(manifest.program.delegate if manifest.program else "")
        self._program = open_program(path)

    def load(self, path: Path) -> _Method:
        spec = self._manifest.graphs[path.name]
        declared = signature(self._program, spec.name, spec)
        try:
            method = self._program.load_method(spec.name)._method
        except RuntimeError as error:
            raise PotexportError(
                f"ExecuTorch cannot load {spec.name} of {self._path.name} "
                f"({str(error).strip().splitlines()[0]}); {_versions(self._manifest)}"
            ) from error
        return _Method(method, spec, *declared)

    def drop_pages(self) -> None:
        """Nothing: what ExecuTorch maps of the file it reads once."""

    def close(self) -> None:
        self._program = None


class _Method:
    """See `bound.Loaded`."""

    def __init__(self, method: Any, spec: GraphSpec, inputs: Signature, outputs: Signature) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._method, self._spec = method, spec

    def binding(self) -> _Binding:
        return _Binding(self._method, self._spec)


class _Binding:
    """See `bound.Binding`. A method is given its inputs as it runs."""

    def __init__(self, method: Any, spec: GraphSpec) -> None:
        self._method = method
        self._tensors: dict[str, Any] = {tensor.name: None for tensor in spec.inputs}
        self._results: dict[str, Array] = {}
        self._names = [tensor.name for tensor in spec.outputs]

    def bind_input(self, name: str, array: Array) -> None:
        self._tensors[name] = binding().tensor(array)

    def bind_output(self, name: str, array: Array) -> None:
        self._results[name] = array

    def run(self) -> None:
        made = self._method(tuple(self._tensors.values()), clone_outputs=False)
        for name, tensor in zip(self._names, made, strict=True):
            self._results[name][...] = tensor.numpy()


class Binding:
    """ExecuTorch's Python binding, and torch as far as it needs it."""

    def __init__(self) -> None:
        if "onnxruntime_qnn" in sys.modules and "executorch" not in sys.modules:
            raise PotexportError(
                "this process has opened an NPU by ONNX Runtime, and ExecuTorch crashes if it "
                "comes second; open the bundle for ExecuTorch first, or in a process of its own"
            )
        try:
            with _without_stderr():
                self.runtime = importlib.import_module("executorch.runtime")
                # Registers kernels for quantized embeddings.
                importlib.import_module("executorch.kernels.quantized")
                self.library = importlib.import_module("executorch.extension.pybindings._C")
                self._torch = importlib.import_module("torch")
        except ImportError as error:
            raise PotexportError(
                f"this bundle needs the package executorch ({error}); install it with: "
                "pip install 'potexport[executorch]'"
            ) from error

    def tensor(self, array: Array) -> Any:
        """A tensor over the array's own memory."""
        return self._torch.from_numpy(array)

    def set_threads(self, threads: int) -> None:
        """Of every program in this process."""
        with _without_stderr():
            if self.library._threadpool_get_thread_count() != threads:
                self.library._unsafe_reset_threadpool(threads)


_BINDING: list[Binding] = []


def binding() -> Binding:
    """The one of this process, loaded when first asked for; PotexportError where it is not
    installed."""
    if not _BINDING:
        _BINDING.append(Binding())
    return _BINDING[0]


def open_program(path: Path) -> Any:
    """An `executorch.runtime.Program`; no method is loaded. PotexportError if it is none."""
    runtime = binding().runtime
    try:
        check = runtime.Verification.InternalConsistency
        return runtime.Runtime.get().load_program(path, verification=check)
    except RuntimeError as error:
        raise PotexportError(
            f"{path} is not a program that ExecuTorch {_installed()} reads "
            f"({str(error).strip().splitlines()[0]}); build the bundle again"
        ) from error


def signature(program: Any, name: str, spec: GraphSpec) -> tuple[Signature, Signature]:
    """(dtype, shape) of a method's inputs and outputs. It knows no names: they are the contract's,
    in its order.

    Raises PotexportError where the method is missing or has another number of them.
    """
    if name not in program.method_names:
        has = ", ".join(sorted(program.method_names)) or "none"
        raise PotexportError(
            f"the program lacks the method {name}; it has {has}: build the bundle again"
        )
    meta = program.metadata(name)
    found = (meta.num_inputs(), meta.num_outputs())
    if found != (len(spec.inputs), len(spec.outputs)):
        raise PotexportError(
            f"method {name} has {found[0]} inputs and {found[1]} outputs where the manifest has "
            f"{len(spec.inputs)} and {len(spec.outputs)}; build the bundle again"
        )

    def declared(info: Any) -> tuple[str, tuple[int, ...]]:
        return TYPES.get(info.dtype(), f"type {info.dtype()}"), tuple(info.sizes())

    inputs = {t.name: declared(meta.input_tensor_meta(i)) for i, t in enumerate(spec.inputs)}
    outputs = {t.name: declared(meta.output_tensor_meta(i)) for i, t in enumerate(spec.outputs)}
    return inputs, outputs


@contextmanager
def _without_stderr() -> Iterator[None]:
    """While it is imported and makes its threads: it warns that it is experimental, its packages
    log what they do not find, and its C++ says on stderr that an x86 is no Arm."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        # Its binding writes what C++ says to Python's stream, whatever that is.
        with quietly(), redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(nowhere)
        os.close(stderr)


def _require(manifest: Manifest) -> None:
    """PotexportError where this runtime is older than the program, or lacks its delegate."""
    assert manifest.program is not None
    registry = binding().runtime.Runtime.get().backend_registry
    built, installed = manifest.tools.get("executorch", ""), _installed()
    if _ordered(installed) < _ordered(built):
        raise PotexportError(
            f"the bundle was built with ExecuTorch {built} and {installed} is installed, which is "
            f"older; install executorch=={built}, or build the bundle again"
        )
    delegate = manifest.program.delegate
    with _without_stderr():  # OpenVINO tells where it was found
        available = registry.is_available(delegate)
    if not available and delegate == "OpenvinoBackend":  # registered, but its library is not found
        raise PotexportError(
            "this bundle needs the package openvino; install it with: pip install "
            "'potexport[openvino]'"
        )
    if not available:
        has = ", ".join(registry.registered_backend_names)
        raise PotexportError(
            f"this ExecuTorch has no {delegate}, which the bundle for {manifest.target} needs; it "
            f"has {has}: run the bundle where it was built for, or build it with --target cpu"
        )


def _versions(manifest: Manifest) -> str:
    built = manifest.tools.get("executorch", "an unknown version")
    return (
        f"it was built with ExecuTorch {built} and {_installed()} is installed: "
        f"install executorch=={built}, or build the bundle again"
    )


def _installed() -> str:
    try:
        return importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _ordered(version: str) -> tuple[int, ...]:
    """1.5.1 -> (1, 5, 1); what is no number counts as 0."""
    return tuple(int(p) if p.isdecimal() else 0 for p in version.partition("+")[0].split("."))
