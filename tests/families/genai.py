"""A bundle in the hands of stock onnxruntime-genai, beside our own session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from potexport.runtime.session import Session
from tests.parity.test_loop import difference, tokens


def generator(bundle: Path, **search: Any) -> Any:
    """A generator over the bundle's folder as it is; search: options beside those of its config."""
    model = onnxruntime_genai.Model(str(bundle))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(**search)
    return onnxruntime_genai.Generator(model, params)


def worst(bundle: Path, *, chunks: bool = True) -> float:
    """The largest difference of any logit from our session's, as a share of the largest: over a
    text that fills the pot to its last slot, of which the first half is read in chunks, or none."""
    session = Session.open(bundle, threads=1)
    slots = session.manifest.pot.slots
    ids = tokens(slots)
    first = slots // 2 + 1 if chunks else 1
    theirs = generator(bundle, min_length=slots)  # no token ends it
    session.feed(ids[:first])
    theirs.append_tokens(ids[:first].astype(np.int32))
    found = 0.0
    for token in ids[first:]:
        found = max(found, difference(session.logits(), theirs.get_logits()[0, -1]))
        session.accept(int(token))
        theirs.append_tokens(np.array([token], np.int32))
    assert session.stats.compressions == 0
    return max(found, difference(session.logits(), theirs.get_logits()[0, -1]))
