"""What a session is made of, from a bundle's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence

from potexport import bundle
from potexport.bundle import Manifest, PolicyFacts
from potexport.runtime.backend import Backend
from potexport.runtime.provider import open_backend
from potexport.runtime.saved import policy_of
from potexport.runtime.text import Text


def parts(
    folder: str | os.PathLike[str],
    *,
    on: str,
    soc: str | None,
    threads: int | None,
    check: bool,
    policy: str | Sequence[str] | None,
    saved: str | os.PathLike[str] | None,
    max_bytes: int | None,
) -> tuple[Manifest, Backend, Text, list[PolicyFacts]]:
    """With the policies that were opened, the one to begin with first; see `Session.open`."""
    manifest = bundle.read(folder)
    bundle.check_files(folder, manifest, digests=check)
    text = Text.open(os.fspath(folder), manifest.files)
    default = manifest.policy.label if saved is None else policy_of(saved, manifest)
    labels = [policy] if isinstance(policy, str) else policy or [default]
    chosen = [manifest.policy_of(label) for label in labels]
    graphs = [each.graph for each in chosen]
    opened = open_backend(
        folder,
        manifest,
        on=on,
        threads=threads,
        soc=soc,
        policies=graphs,
        max_bytes=max_bytes,
    )
    return manifest, opened, text, chosen
