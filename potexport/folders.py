"""Writing a bundle's folder: all of it, or nothing."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from potexport.bundle import MANIFEST, FileFacts, Manifest, sha256
from potexport.errors import PotexportError


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files, with the size and digest of every other."""
    files = {
        path.name: FileFacts(path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())
    }
    complete = replace(manifest, files=files)
    (folder / MANIFEST).write_text(complete.to_json(), encoding="utf-8")


@contextmanager
def new_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `destination` if the block succeeds, and disappears if it
    does not.

    A killed build leaves the sibling, whose name begins with a dot, and never a half bundle; the
    next build of the same bundle removes it.
    """
    refuse_existing(destination, force=force)
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, destination.name)
        prefix = f".{destination.name}.building-{os.getpid()}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise PotexportError(
            f"cannot write beside {destination}: {error.strerror}; choose another --output"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        if destination.exists():
            refuse_existing(destination, force=force)
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)) / "old"
            destination.rename(old)
            folder.rename(destination)
            shutil.rmtree(old.parent, ignore_errors=True)
        else:
            folder.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed builds of this bundle left; a build that is still running keeps its
    folder. Only where the system tells which processes run."""
    if not Path("/proc/self").exists():
        return
    for left in parent.glob(f".{glob.escape(name)}.building-*-*"):
        process = left.name.rsplit("-", 2)[1]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


def refuse_existing(destination: Path, *, force: bool) -> None:
    """PotexportError if the destination is taken: always for what is not a bundle, without `force`
    for what is one."""
    if not destination.exists():
        return
    is_bundle = (destination / MANIFEST).is_file()
    if not force:
        hint = "add --force to replace it" if is_bundle else "choose another --output"
        raise PotexportError(f"{destination} exists; {hint}")
    if not is_bundle and not (destination.is_dir() and not any(destination.iterdir())):
        raise PotexportError(
            f"{destination} exists and is not a bundle, so --force does not replace it; choose "
            "another --output"
        )
