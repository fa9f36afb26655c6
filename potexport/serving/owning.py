"""One server at a time uses a folder of saved conversations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potexport.errors import PotexportError

LOCK = ".potexport-serve.lock"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the folder, for this user alone. The lock ends with the process, however that ends.

    Raises PotexportError if it cannot be written to, or another server has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise PotexportError(
            f"the folder of saved conversations {folder} cannot be used: {error.strerror}; choose "
            "another --state"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PotexportError(
                f"another server uses the folder of saved conversations {folder}; end it, or "
                "choose another --state"
            ) from error
        yield
