"""onnxruntime-web, which the page runs on: fetched once with npm, checked, and kept.

Decides which version, and which of its files. No registry is named here: npm knows its own.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from potexport.errors import PotexportError

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
# SHA-512 of the package, as npm writes it.
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1Sigq"
    "R4CXAfKYQ=="
)
WASM = "ort-wasm-simd-threaded"
# What a page needs of it, with its SHA-256: WebAssembly alone, and the build that knows WebNN.
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    f"{WASM}.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    f"{WASM}.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    f"{WASM}.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    f"{WASM}.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
SECONDS = 300  # that npm may take


def home() -> Path:
    """Where it is kept if nobody says otherwise."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "potexport" / f"onnxruntime-web-{VERSION}"


def find(given: Path | None = None, *, keep: Path | None = None) -> Path:
    """The folder with its files, checked.

    Args:
        given: the package from npm, a file.
        keep: the folder, made if it is not there; `home` by default.

    Raises PotexportError if it is not there and cannot be fetched, or is another.
    """
    folder = keep or home()
    if given is None and all(_is(folder / name, digest) for name, digest in FILES.items()):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        package = given or _fetch(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _unpack(package, unpacked)
        if folder.exists():  # incomplete, or altered
            os.replace(folder, Path(scratch) / "old")
        os.replace(unpacked, folder)
    return folder


def _is(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _fetch(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise PotexportError(
            f"the page needs onnxruntime-web {VERSION}, which npm fetches once, and there is no "
            f"npm; install Node.js, or give the package from npm: --ort {PACKAGE}"
        )
    command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}", "--pack-destination", "."]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        said = done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if not (folder / PACKAGE).is_file():
        why = next((line for line in said.splitlines() if line.strip()), "no answer")
        raise PotexportError(
            f"npm cannot fetch onnxruntime-web {VERSION} ({why.strip()[:200]}); go online once, or "
            f"give its package: --ort {PACKAGE}"
        )
    return folder / PACKAGE


def _unpack(package: Path, folder: Path) -> None:
    """Write the files that are needed, of the package that is expected and no other."""
    try:
        with package.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise PotexportError(
            f"the package of onnxruntime-web {package} cannot be read: {error.strerror}"
        ) from error
    if f"sha512-{base64.b64encode(digest).decode()}" != INTEGRITY:
        raise PotexportError(
            f"{package} is not npm's onnxruntime-web {VERSION}: its SHA-512 is another; fetch it "
            f"again with: npm pack onnxruntime-web@{VERSION}"
        )
    folder.mkdir()
    with tarfile.open(package) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None  # the digest says so
            (folder / name).write_bytes(member.read())
