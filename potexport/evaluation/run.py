"""`evaluate`: opens everything, does the tasks one after the other, and makes the result.

The result is the document of format FORMAT: `potexport eval --json` prints it, `potexport report`
reads it. Within a format keys are only added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from potexport import __version__, bundle
from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.evaluation import longbench, needles, prose, scores, tables
from potexport.evaluation.loop import Loop
from potexport.evaluation.perplexity import Perplexity
from potexport.evaluation.prose import Prose
from potexport.evaluation.protocol import protocol
from potexport.evaluation.retrieval import Readers, Retrieval
from potexport.evaluation.settings import Settings
from potexport.evaluation.texts import Texts
from potexport.plan import CATALYST
from potexport.runtime import reading
from potexport.runtime.quiet import quietly
from potexport.runtime.session import Ids, Session

if TYPE_CHECKING:
    from potexport.evaluation.longbench import Record
    from potexport.evaluation.untouched import Untouched

FORMAT = 1
KIND = "potexport-eval"
# What is being done, how much of it is done, and of how much; units are readings.
Progress = Callable[[str, int, int], None]


def evaluate(
    settings: Settings, *, on_progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure a bundle; the result as plain data.

    Raises PotexportError for what a person can change, and as far as possible before any reading.
    """
    started = perf_counter()
    tasks = settings.wanted()
    manifest = bundle.read(settings.bundle)
    policies = [manifest.policy_of(label) for label in settings.policies or _labels(manifest)]
    records = longbench.read(
        settings.data,
        tasks=tuple(task for task in tasks if task in longbench.LIMITS),
        limit=settings.limit,
        most=settings.max_new_tokens,
    )
    if any(record.task == "summary" for record in records):
        scores.rouge_scorer()
    text = None if settings.text is None else _prose(settings.text)
    labels = [each.label for each in policies]
    session = Session.open(settings.bundle, threads=settings.threads, policy=labels)
    untouched = _untouched(settings, manifest)
    loop = Loop(session, keep=_keep(settings, session), catalysts=_catalysts(settings, manifest))
    readers = Readers(
        loop,
        untouched,
        tuple(labels),
        depending=frozenset(each.label for each in policies if "mass" in each.needs),
        modes=settings.questions,
    )
    made = _Run(settings, readers, tasks, on_progress)
    if text is not None:
        made.prose(text)
    made.records(records)
    return {
        **_facts(settings, manifest, session, policies, loop),
        "text": None if text is None else {"name": text.name, "sha256": text.sha256},
        "protocol": protocol(tasks, loop, settings),
        "notes": made.notes(),
        "tasks": made.tasks,
        "costs": {label: cost.to_json() for label, cost in loop.costs.items()},
        "seconds": perf_counter() - started,
        "tools": _tools(),
    }


def _labels(manifest: Manifest) -> tuple[str, ...]:
    return tuple(each.label for each in manifest.policies)


def _prose(path: str) -> Prose:
    content = "".join(reading.Document.open(path).blocks())
    if not content.strip():
        raise PotexportError(f"the text {path} is empty; give prose to read")
    return Prose(Path(path).name, hashlib.sha256(content.encode()).hexdigest(), content)


def _untouched(settings: Settings, manifest: Manifest) -> Untouched | None:
    if settings.model is None:
        return None
    from potexport.pipeline import require_export_packages

    require_export_packages()
    with quietly():  # transformers imports torchao where it is installed, which is not quiet
        import torch

        from potexport.evaluation.untouched import Untouched
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return Untouched.load(
        settings.bundle,
        manifest,
        settings.model,
        adapter=settings.adapter,
        trust_remote_code=settings.trust_remote_code,
    )


def _keep(settings: Settings, session: Session) -> int:
    """PotexportError for a number that no compression could keep."""
    from potexport.runtime import keeping

    pot = session.manifest.pot
    keep = pot.keep if settings.keep is None else settings.keep
    keeping.allowed(pot, pot.slots).check(keep)
    return keep


def _catalysts(settings: Settings, manifest: Manifest) -> dict[str, str]:
    """What scores the pot where the question is unknown: what was asked for, or what the policy
    alone in a bundle would have."""
    if settings.catalyst is not None:
        return dict.fromkeys(_labels(manifest), settings.catalyst)
    own = manifest.catalyst if manifest.catalyst not in ("", CATALYST) else ""
    return {
        each.label: own or ("" if each.can_be_blind else CATALYST) for each in manifest.policies
    }


@dataclass
class _Run:
    """The tasks, and what they made."""

    settings: Settings
    readers: Readers
    wanted: tuple[str, ...]
    on_progress: Progress
    tasks: dict[str, Any] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)
    _done: int = 0
    _total: int = 0

    def prose(self, text: Prose) -> None:
        """The tasks of --text. All documents are made first: a text that is too short is refused
        before anything is read."""
        session, settings = self.readers.loop.session, self.settings
        lengths = tuple(dict.fromkeys(settings.lengths)) or (2 * session.manifest.pot.slots,)
        common = {"count": settings.documents, "seed": settings.seed}
        documents = {}
        if "needle" in self.wanted or "hit-rate" in self.wanted:
            documents = {
                length: needles.documents(session.text, text, length=length, **common)
                for length in lengths
            }
        opening = reading.frame(session.text, question=None, system=None, raw=True).head
        passages = {
            length: prose.passages(session.text, text, opening, length=length, **common)
            for length in self._past_the_pot(lengths)
        }
        for length, found in documents.items():
            self._retrieval(found, length)
        for length, ids in passages.items():
            self._perplexity(ids, length)

    def _past_the_pot(self, lengths: tuple[int, ...]) -> list[int]:
        """The lengths that perplexity can be measured at; PotexportError if it was asked for and
        there is none."""
        if "perplexity" not in self.wanted:
            return []
        least = Perplexity.least(self.readers.loop)
        fit = [length for length in lengths if length >= least]
        if not fit and "perplexity" in self.settings.tasks:
            raise PotexportError(
                f"perplexity takes documents that fill the pot, of at least {least} tokens; "
                f"--length is {max(lengths)}"
            )
        if len(fit) < len(lengths):
            self._notes.append(
                f"perplexity is measured on documents that fill the pot, of {least} tokens or more"
            )
        return fit

    def records(self, records: list[Record]) -> None:
        """The tasks of --data."""
        if not records:
            return
        texts = Texts(self.readers, self._tell)
        self._begin(len(records) * self._readings(baselines=1))
        for number, record in enumerate(records, 1):
            texts.read(record, f"{record.dataset}, record {number}")
        for task in longbench.LIMITS:
            if any(record.task == task for record in records):
                self._add(task, texts.rows(task, **self._common), {})
        if texts.cut:
            self._notes.append(
                f"full got both ends of {texts.cut} contexts: the model was trained on fewer tokens"
            )
        if texts.untruncated:
            self._notes.append(
                f"truncation lacks {texts.untruncated} records whose question fills the pot"
            )

    def notes(self) -> list[str]:
        if self.readers.untouched is None:
            rate = ", and so is hit-rate" if self.settings.text else ""
            self._notes.append(
                f"full is missing{rate}: the untouched model is not there; give --model"
            )
        if self.readers.loop.cut:
            self._notes.append(
                f"questions were up to {self.readers.loop.cut} tokens longer than the catalyst "
                "width; their last tokens scored the pot"
            )
        return list(dict.fromkeys(self._notes))

    @property
    def _common(self) -> dict[str, Any]:
        return {"depending": self.readers.depending, "seed": self.settings.seed}

    def _retrieval(self, documents: list[needles.Document], length: int) -> None:
        """`needle` and `hit-rate` at one length."""
        loop = self.readers.loop
        wanted = {name: name in self.wanted for name in ("needle", "hit-rate")}
        run = Retrieval(
            self.readers,
            documents,
            needle=wanted["needle"],
            hits=wanted["hit-rate"],
            tell=self._tell,
        )
        self._begin(len(documents) * self._readings(baselines=len(run.baselines)))
        for number, document in enumerate(documents, 1):
            run.read(document, f"{length:,} tokens, document {number}")
        self._notes += run.notes
        digits = all(q.digits for document in documents for q in document.questions)
        if wanted["needle"]:
            rows = tables.needle(run.table, length=length, **self._common)
            facts = {
                "unit": "digit" if digits else "token",
                "documents": len(documents),
                "questions": len(needles.KINDS) * len(documents),
                "depths": [i / needles.BINS for i in range(needles.BINS + 1)],
            }
            self._add("needle", rows, facts)
        if wanted["hit-rate"]:
            rows = tables.hit_rate(run.table, length=length, keep=loop.keep, **self._common)
            self._add("hit-rate", rows, {"documents": len(documents)})

    def _perplexity(self, passages: list[Ids], length: int) -> None:
        run = Perplexity(self.readers, length, self._tell)
        readers = len(self.readers.policies) + 1 + (self.readers.untouched is not None)
        self._begin(readers * len(passages))
        for number, ids in enumerate(passages, 1):
            run.read(ids, f"perplexity of {length:,} tokens, document {number}")
        rows = tables.perplexity(run.nats, length=length, seed=self.settings.seed)
        scored_by = "prefill" if run.by_prefill else "decode"
        self._add("perplexity", rows, {"documents": len(passages), "scored_by": scored_by})

    def _add(self, task: str, rows: list[tables.Row], facts: dict[str, Any]) -> None:
        found = self.tasks.setdefault(task, {**facts, "rows": []})
        found["rows"] = tables.in_order([*found["rows"], *rows], self.readers.policies)
        if any("length" in row for row in rows):
            found["lengths"] = sorted({row["length"] for row in found["rows"]})

    def _readings(self, *, baselines: int) -> int:
        """How often a document is told of."""
        own = sum(len(self.readers.readings(policy)) for policy in self.readers.policies)
        return own + baselines + (self.readers.untouched is not None)

    def _begin(self, count: int) -> None:
        self._done, self._total = 0, count

    def _tell(self, what: str) -> None:
        self.on_progress(what, self._done, self._total)
        self._done += 1


def _facts(
    settings: Settings,
    manifest: Manifest,
    session: Session,
    policies: list[PolicyFacts],
    loop: Loop,
) -> dict[str, Any]:
    """What was measured."""
    pot = {**asdict(manifest.pot), "keep": loop.keep, "bytes": session.backend.pot.bytes}
    return {
        "format": FORMAT,
        "kind": KIND,
        "command": settings.command,
        "bundle": settings.bundle.resolve().name,
        "model": {"source": manifest.source, **asdict(manifest.model)},
        "untouched": None if settings.model is None else Path(settings.model).name,
        "pot": pot,
        "precision": manifest.precision,
        "target": manifest.target,
        "runtime": manifest.runtime,
        "policies": [
            {
                "label": each.label,
                "name": each.name,
                "needs": list(each.needs),
                "settings": each.settings,
                "catalyst": loop.catalysts[each.label],
            }
            for each in policies
        ],
        "catalyst": manifest.catalyst,
        "seed": settings.seed,
    }


def _tools() -> dict[str, str]:
    import importlib.metadata
    import platform

    found = {"potexport": __version__, "python": platform.python_version()}
    for name in ("numpy", "onnxruntime", "executorch", "torch", "transformers", "rouge-score"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
