"""Which cases of a test are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], *, rare: Collection[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: those of `rare` are marked `thorough`. One with several values
    is a tuple."""
    return [
        pytest.param(
            *(each if isinstance(each, tuple) else (each,)),
            marks=[pytest.mark.thorough] if each in rare else [],
        )
        for each in every
    ]
