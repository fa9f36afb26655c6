"""Which processor runs a bundle: the NPU where there is one it was compiled for, or the CPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from potexport.bundle import Manifest, Npu
from potexport.errors import PotexportError
from potexport.runtime import limits
from potexport.runtime.backend import Backend
from potexport.spec import MODEL_GRAPHS, choosing

BACKENDS = ("auto", "npu", "cpu")


def open_backend(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    *,
    on: str,
    threads: int | None,
    soc: str | None,
    policies: Sequence[str] = ("compress",),
    max_bytes: int | None = None,
) -> Backend:
    """Open the graphs.

    Args:
        policies: the compression graphs to open.
        on: "npu", "cpu", or "auto": the NPU if the bundle has contexts for this device's.
        threads: all that this process may use where it is None.
        soc: the chip to take contexts of; by default this device's.
        max_bytes: of memory that the session may take; this machine's by default.

    Raises PotexportError if the graphs, or the processor asked for, are not there.
    """
    if on not in BACKENDS:
        raise PotexportError(f"backend is {on!r}; choose one of: {', '.join(BACKENDS)}")
    threads, scratch = threads or cores(), limits.scratch(folder, manifest, max_bytes)
    graphs = [name for name in manifest.graphs if name in MODEL_GRAPHS]
    wanted = [each for name in policies for each in (name, choosing(name))]
    graphs += [name for name in wanted if name in manifest.graphs and name not in graphs]
    if manifest.program is not None:
        if on == "npu" or soc is not None:
            raise PotexportError(
                f"this bundle is for ExecuTorch and {manifest.program.delegate}, which is where it "
                "runs; omit --backend and --soc"
            )
        from potexport.runtime.executorch_backend import ExecutorchBackend

        return ExecutorchBackend(folder, manifest, graphs, threads=threads)
    if on == "npu" or (on == "auto" and manifest.npu and _has_npu()):
        npu = choose(manifest, soc)
        if npu is not None:
            return _on_npu(folder, manifest, npu, threads)
        if on == "npu":
            has = ", ".join(each.soc for each in manifest.npu) or "no chip at all"
            raise PotexportError(
                f"this bundle was compiled for {has}, not for {soc or device_soc() or 'this one'}; "
                "build it with --target android-npu and the --soc of the device"
            )
    from potexport.runtime.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, manifest, graphs, threads=threads, scratch=scratch)


def cores() -> int:
    """The cores that this process may use; not all systems say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def choose(manifest: Manifest, soc: str | None) -> Npu | None:
    """The contexts of this chip; where neither the caller nor the device names one, the only ones
    there are."""
    name = soc or device_soc()
    if name is None:
        return manifest.npu[0] if len(manifest.npu) == 1 else None
    return next((npu for npu in manifest.npu if npu.soc == name.lower()), None)


def device_soc() -> str | None:
    """What Android calls the chip, such as "SM8650"; None elsewhere."""
    try:
        asked = subprocess.run(
            ["getprop", "ro.soc.model"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() or None


def _has_npu() -> bool:
    from potexport.runtime import qnn_backend

    if qnn_backend.emulated():
        return False
    try:
        return bool(qnn_backend.qnn_devices())
    except PotexportError:
        return False


def _on_npu(folder: str | os.PathLike[str], manifest: Manifest, npu: Npu, threads: int) -> Backend:
    from potexport.runtime.qnn_backend import QnnBackend

    contexts = {name: Path(folder) / context.file for name, context in npu.contexts.items()}
    return QnnBackend(
        folder, manifest, contexts, embedding=npu.embedding, shared=True, threads=threads
    )
