"""A model's own code may fail in as many ways as models have authors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from potexport.errors import PotexportError
from potexport.geometry import ModelFacts


@contextmanager
def refusing(facts: ModelFacts) -> Iterator[None]:
    """Turn whatever goes wrong in a model's own code into one line, with the cause kept.

    Running it over a pot, or tracing it, can fail in as many ways as models have authors.
    """
    try:
        yield
    except (PotexportError, MemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (str(first).strip() or "no message").splitlines()[0][:200]
        raise PotexportError(
            f"model type {facts.model_type!r} is not supported yet: its code does not run over a "
            f"pot ({type(first).__name__}: {reason}); choose a Llama-like decoder"
        ) from error
