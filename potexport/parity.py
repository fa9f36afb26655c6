"""`verify`: a bundle against PyTorch, in the two halves that a context has.

While the context fits the pot, the oracle is transformers' own `generate` with its full cache. Past
the pot, it is the same loop run eagerly (`reference`). Every check states its oracle, what was
measured and what is tolerated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potexport import adapters, bundle, loader
from potexport.bundle import Manifest, Npu
from potexport.errors import PotexportError
from potexport.recording import Comparison, Recording, compare, enough_tokens, record
from potexport.runtime.quiet import quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from potexport.following import Oracle
    from potexport.npu_parity import Reading
    from potexport.runtime.backend import Array
    from potexport.runtime.session import Session


@dataclass(frozen=True)
class Tolerance:
    """What a precision may cost, against PyTorch in fp32.

    tokens: share of greedy tokens that differ. fits, past: largest difference of a logit while the
    context fits, and after compressions. kept: share of kept slots that differ.
    """

    tokens: float
    fits: float
    past: float
    kept: float


# Measured on SmolLM2-135M, logits up to 41, over 6 to 11 compressions: fp32 0, 8e-5, 9e-5, 0 (Gemma
# 3 270M by `blend`, whose scores have steps: 1 slot of 36,864); fp16
# 0, 0.03, 0.02, 0.15%; a16w8 1 of 32, 1.1, 0.5, 1.7%; w4 9 of 32, 10, 5, 11%.
TOLERANCES = {
    "fp32": Tolerance(0.0, 5e-4, 1e-3, 2e-4),
    "fp16": Tolerance(0.0, 0.5, 0.5, 0.01),
    "a16w8": Tolerance(0.1, 3.0, 3.0, 0.05),
    "w4": Tolerance(0.5, 20.0, 20.0, 0.25),
    "w8": Tolerance(0.5, 20.0, 20.0, 0.25),
    "w4-w8": Tolerance(0.5, 20.0, 20.0, 0.25),
    # Pots of fp32 weights; past the pot the oracle has the same codes. Measured over 3 and 6
    # compressions: int8 0 of 16, 0.064, 0.004, 0; int4 1 of 32, 2.0, 0.3, 0.
    "int8": Tolerance(0.1, 0.5, 0.1, 0.01),
    "int4": Tolerance(0.25, 6.0, 2.0, 0.02),
}


@dataclass(frozen=True)
class Check:
    """One claim: what was measured against which oracle, and whether it held."""

    name: str
    measured: float | str
    tolerance: float | str
    passed: bool
    detail: str


@dataclass
class Report:
    """All checks of one `verify`."""

    bundle: str
    model: str
    precision: str
    pot_dtype: str = ""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was seen and is no check

    @property
    def allowed(self) -> Tolerance:
        """What precision or pot may cost, whichever is more."""
        names = filter(None, (self.precision, self.pot_dtype))
        each = (astuple(TOLERANCES[name]) for name in names)
        return Tolerance(*map(max, zip(*each, strict=True)))

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def add(self, name: str, measured: float, tolerance: float, detail: str) -> None:
        # Not `measured > tolerance` to fail: a NaN must not pass.
        self.checks.append(Check(name, measured, tolerance, measured <= tolerance, detail))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify(
    folder: Path,
    model: str,
    *,
    text: str | None = None,
    question: str | None = None,
    compressions: int | None = None,
    steps: int | None = None,
    soc: str | None = None,
    adapter: Sequence[str] = (),
    trust_remote_code: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run a bundle beside PyTorch on the same tokens.

    Args:
        model: the folder, GGUF file or hub id that the bundle was built from.
        text: what to read, long enough for the compressions; seeded random tokens otherwise.
        question: asked behind the text, and scores the pot, on the emulator of an NPU.
        compressions: how many to compare past the pot; 10, and 3 where an emulator does them.
        steps: how many tokens to generate; 64, and 24 on an emulator.
        soc: the chip to emulate, of those the bundle was compiled for; the first by default.
        adapter: those that the bundle was built with, in their order.

    Raises PotexportError if the model is not the bundle's, or the text is too short.
    """
    import torch

    with quietly():  # transformers imports torchao where it is installed, which is not quiet
        from potexport import npu_parity
        from potexport.following import Oracle
    from potexport.runtime.session import Session

    on_stage("load")
    manifest = bundle.read(folder)
    npu = _chip(manifest, soc)
    compressions = compressions or (3 if npu else 10)
    steps = steps or (24 if npu else 64)
    session = Session.open(folder, backend="cpu")
    # fp32 whatever the bundle's precision: the oracle is the model, not its rounding.
    untouched = adapters.load_model(
        loader.resolve(model),
        adapters.find(adapter),
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=trust_remote_code,
    )
    same_model(folder, manifest, untouched)
    ids = _ids(session, text, compressions, steps)
    over = _asked(session, ids, question, steps)
    report = Report(str(folder), model, manifest.precision, manifest.pot_dtype)
    with torch.no_grad():
        on_stage("context that fits")
        _fits(report, session, untouched, ids, steps)
        on_stage("past the pot")
        oracle = Oracle.of(folder, manifest, untouched, session.text)
        _past(report, session, oracle, ids)
        if npu:
            npu_parity.verify(report, folder, npu, oracle, over, on_stage)
    return report


def _chip(manifest: Manifest, soc: str | None) -> Npu | None:
    """The contexts to check; None for a bundle that has none."""
    if soc is None:
        return manifest.npu[0] if manifest.npu else None
    for npu in manifest.npu:
        if npu.soc == soc.lower():
            return npu
    has = ", ".join(npu.soc for npu in manifest.npu) or "no chip"
    raise PotexportError(f"the bundle was compiled for {has}, not for {soc!r}; choose one of these")


def _asked(session: Session, ids: Array, question: str | None, steps: int) -> Reading:
    """The tokens as they are; or between a chat and a question, which then scores the pot."""
    from potexport.npu_parity import Reading
    from potexport.runtime import reading

    if question is not None:
        around = reading.frame(session.text, question=question, system=None, raw=False)
        ids = np.concatenate([around.head, ids, around.tail])
        session.set_catalyst(question)
    return Reading(ids, session.catalyst, steps, question)


def same_model(folder: Path, manifest: Manifest, model: PreTrainedModel) -> None:
    """Raise PotexportError, naming the difference, unless the bundle holds this model's weights."""
    from potexport.facts import model_facts, weights_sha256
    from potexport.runtime.tensors import map_weights

    facts = model_facts(model.config)
    if facts != manifest.model:
        raise PotexportError(
            f"the bundle was built from another model: it has {manifest.model}, --model has {facts}"
        )
    if manifest.program:
        if weights_sha256(model) != manifest.program.source_sha256:
            raise PotexportError(
                "the bundle was built from another model: its weights are not those of --model"
            )
        return
    stored = map_weights(folder / manifest.weights)
    own = model.state_dict()
    for name, array in stored.items():
        plain = name.removesuffix(".T")
        tensor = own.get(plain, own.get(f"model.{plain}"))
        if tensor is None:
            continue  # a table of ours, or a tied weight's other name
        wanted = tensor.numpy().T if name.endswith(".T") else tensor.numpy()
        if not np.array_equal(array, wanted.astype(array.dtype)):
            raise PotexportError(
                f"the bundle was built from another model: its {plain} is not that of --model; "
                f"it was built from {manifest.source}"
            )


def _ids(session: Session, text: str | None, compressions: int, steps: int) -> Array:
    """Tokens enough for every check."""
    pot = session.manifest.pot
    # Each compression makes room for at least pot - keep - chunk more tokens.
    needed = pot.slots + compressions * (pot.slots - pot.keep) + steps
    short = (
        f"{compressions} compressions of this pot need {needed}: give a longer --text or fewer "
        "--compressions"
    )
    return enough_tokens(session, text, needed, short)


def _fits(report: Report, session: Session, model: PreTrainedModel, ids: Array, steps: int) -> None:
    """Greedy tokens and every logit against transformers' generate."""
    import torch
    from transformers import GenerationConfig

    pot = session.manifest.pot
    steps = min(steps, pot.slots // 2)
    prompt = ids[: pot.slots - steps]
    generate: Any = model.generate
    greedy: Any = GenerationConfig
    wanted = generate(
        torch.from_numpy(prompt[None].astype(np.int64)),
        # Not the model's own: its penalties and end tokens would choose other tokens than greedy.
        generation_config=greedy(
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    session.reset()
    session.feed(prompt)
    chosen, difference = [], 0.0
    for token, logits in zip(wanted.sequences[0, prompt.size :], wanted.logits, strict=True):
        mine = session.logits()
        difference = max(difference, _difference(mine, logits[0].numpy()))
        chosen.append(int(mine.argmax()))
        session.accept(int(token))  # the oracle's, so that one difference is not counted twice
    expected = wanted.sequences[0, prompt.size :].tolist()
    different = sum(a != b for a, b in zip(chosen, expected, strict=True))
    oracle = f"{steps} greedy steps after {prompt.size} tokens, against transformers' generate"
    allowed = report.allowed
    report.add("context that fits: tokens that differ", different, allowed.tokens * steps, oracle)
    report.add(
        "context that fits: logits", difference, allowed.fits, f"largest difference, {oracle}"
    )


def _past(report: Report, session: Session, oracle: Oracle, ids: Array) -> None:
    """Kept slots of every compression, and the logits after the last, against the eager loop.

    In fp32 the oracle goes its own way; otherwise, or where the two part, it follows the bundle's
    compressions (`following`): one near tie decided otherwise, and they read different contexts
    from then on. Followed, a tie is one slot, and what is no tie comes back at every compression.
    """
    mine = record(session, ids, steps=1)
    exact = report.precision == "fp32" and not report.pot_dtype

    def read(leader: Recording | None) -> tuple[Recording, Comparison]:
        asked = session.catalyst.tolist()
        theirs = record(oracle.session(leader), ids, forced=mine.tokens, catalyst=asked)
        return theirs, compare(mine, theirs)

    wanted, seen = read(None if exact else mine)
    if exact and seen.disagreements:
        report.notes.append(
            f"On its own way PyTorch kept {seen.disagreements} of {seen.kept} slots otherwise, "
            "from the first near tie on; slots and logits above are where it follows."
        )
        exact = False
        wanted, seen = read(mine)
    where = f"{seen.compressions} compressions of {len(session.backend.pot.chosen)} layers"
    how = "eager PyTorch" if exact else "eager PyTorch in fp32 that follows them"
    share = seen.disagreements / seen.kept if seen.kept else float("nan")
    report.add(
        "past the pot: kept slots that differ",
        share,
        report.allowed.kept,
        f"{where}, against {how}",
    )
    report.add(
        "past the pot: logits",
        _difference(mine.logits, wanted.logits),
        report.allowed.past,
        f"largest difference after {seen.compressions} compressions, against {how}",
    )


def _difference(mine: Array, wanted: Array) -> float:
    return float(np.abs(mine - wanted).max())
