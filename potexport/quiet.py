"""Libraries log, and warn of, what does not concern us."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quietly() -> Iterator[None]:
    """No log below an error, and no warning, of anybody."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextmanager
def silently() -> Iterator[None]:
    """Nothing on standard output, and none of tqdm's bars: compilers tell every operator there."""
    import tqdm

    kind, before = tqdm.std.tqdm, tqdm.std.tqdm.__init__
    kind.__init__ = functools.partialmethod(before, disable=True)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        kind.__init__ = before
