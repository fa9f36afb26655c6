"""How much memory a bundle may take, and what it says that it takes."""

from __future__ import annotations

import os
from pathlib import Path

from potexport.bundle import Manifest
from potexport.errors import PotexportError


def physical() -> int | None:
    """Bytes of this machine's memory, if it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def planned(manifest: Manifest) -> int:
    """Bytes of a session: the weights once, packed; the pot; each graph's inputs and outputs. What
    graphs compute in between comes on top."""
    return manifest.files[manifest.weights].size + sum(manifest.layout.memory().values())


def scratch(folder: str | os.PathLike[str], manifest: Manifest, most: int | None) -> int | None:
    """What is left for what graphs compute in between, in bytes; None for no limit.

    most: of the whole session; this machine's memory where it is None. Raises PotexportError for a
    bundle that says it takes more.
    """
    most = physical() if most is None else most
    if most is None:
        return None
    needed = planned(manifest)
    if needed >= most:
        raise PotexportError(
            f"{Path(folder)} takes {needed >> 20:,} MiB and more of memory, and may take "
            f"{most >> 20:,}; build it with a smaller --pot or in fewer bits, or give Session.open "
            "a larger max_bytes"
        )
    return most - needed
