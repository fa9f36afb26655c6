"""Where an error of ours came from, without its message, which may hold what somebody said."""

from __future__ import annotations

import traceback
from pathlib import Path


def where(error: BaseException) -> str:
    """One line: the error's type and the last places in the code, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = [f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in frames]
    return f"{type(error).__name__} at {' > '.join(places)}"
