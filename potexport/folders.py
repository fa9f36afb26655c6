"""Writing a bundle's folder: all of it, or nothing."""

from __future__ import annotations

import ctypes
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

OLD = "old"  # within the sibling, the bundle that is about to be replaced


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
        if not destination.exists():
            folder.rename(destination)
            return
        refuse_existing(destination, force=force)
        if not _exchange(folder, destination):
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)) / OLD
            destination.rename(old)
            folder.rename(destination)
            shutil.rmtree(old.parent, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names, so that at no moment one of the names leads nowhere; False
    where the system, or the disk, cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux has it
    except (OSError, TypeError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed builds of this bundle left; a build that is still running keeps its
    folder. Only where the system tells which processes run. A bundle that one had set aside, and
    not yet replaced, gets its name back."""
    if not Path("/proc/self").exists():
        return
    for left in parent.glob(f".{glob.escape(name)}.building-*-*"):
        process = left.name.rsplit("-", 2)[1]
        if process.isdigit() and not Path("/proc", process).exists():
            if (left / OLD / MANIFEST).is_file() and not (parent / name).exists():
                (left / OLD).rename(parent / name)
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
