"""The loop: read any number of tokens into a pot of fixed size, and generate from it.

This file decides when to compress and what each token's novelty is; it knows neither files nor
graphs (`backend`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Literal

import numpy as np

from potexport.bundle import Manifest, PolicyFacts
from potexport.errors import PotexportError
from potexport.runtime import compressing, keeping
from potexport.runtime.backend import Array, Backend
from potexport.runtime.conversation import Chat
from potexport.runtime.generating import check_limit, generated
from potexport.runtime.ids import Ids, token_ids
from potexport.runtime.opening import parts
from potexport.runtime.records import Settings, State, Stats, Token
from potexport.runtime.said import Said
from potexport.runtime.sampling import Sampler, Sampling, surprise
from potexport.runtime.saved import read_session, write_session
from potexport.runtime.text import StopStrings, Text

__all__ = ["Ids", "Session", "State", "Stats", "Token"]


class Session:
    """One conversation with one bundle. Memory and time per token do not depend on how much was
    read."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        text: Text,
        policies: Sequence[PolicyFacts] = (),
    ) -> None:
        """policies: those that the backend opened; the bundle's first by default."""
        self.manifest, self.backend, self.text = manifest, backend, text
        self._opened = {each.label: each for each in policies or (manifest.policy,)}
        self.keep: int | Literal["auto"] = manifest.pot.keep  # slots that a compression keeps
        self.keep_mass = keeping.SHARE  # of the attention, where `keep` is "auto"
        self.note = ""  # the caller's own, saved with the rest
        # Sees the kept slots, L x (Hkv, keep).
        self.on_compress: Callable[[list[Array]], None] | None = None
        self._asked = False  # whether somebody set the catalyst
        self._catalyst = self._fitting(self._ids(manifest.catalyst_of(backend.policy)))
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read; the catalyst stays."""
        self.backend.pot.fill = self.backend.pot.pinned = 0
        self._pending = np.empty(0, np.int32)  # not read yet: a chunk waits for the token after it
        self._fed = 0  # so many of them, the last ones, were fed and not generated
        self._novelty = 0.0  # of the first pending token; the very first token has none
        self._last: Array | None = None  # logits that nothing has followed yet
        self._to_come: int | None = None
        self._tail = np.empty(0, np.int32)  # the last tokens read, the same in every head
        self._stats = Stats()
        self.said: Said | None = None  # `chat` has its own account of what was read

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        backend: str = "auto",
        soc: str | None = None,
        threads: int | None = None,
        check: bool = True,
        policy: str | Sequence[str] | None = None,
        saved: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
    ) -> Session:
        """Load a bundle.

        Args:
            policy: by label, of those that the bundle holds, the first by default; of several, all
                are opened and the first is used until `policy` is set.
            backend: "npu", "cpu", or "auto": the NPU if the bundle was compiled for this device's.
            soc: the chip to take the contexts of; this device's by default.
            threads: of graphs on the CPU; all that this process may use by default.
            check: compare every file's SHA-256 with the manifest; sizes are compared in any case.
            saved: a file to `load`; its policy is then the default.
            max_bytes: of memory that it may take (`limits.planned`, and what graphs compute in
                between); all that this machine has by default.

        Raises PotexportError for a bundle, or a file, that is missing, incomplete, altered or of a
        newer format.
        """
        manifest, opened, text, chosen = parts(
            folder, on=backend, soc=soc, threads=threads, check=check, policy=policy, saved=saved,
            max_bytes=max_bytes,
        )  # fmt: skip
        session = cls(manifest, opened, text, chosen)
        session.policy = chosen[0].label
        if saved is not None:
            session.load(saved, policy=session.policy)
        return session

    @property
    def policies(self) -> list[str]:
        """The labels of those that can be used."""
        return list(self._opened)

    @property
    def policy(self) -> str:
        """The label of the one that the next compression goes by. Setting it leaves the pot as it
        is; the catalyst stays too, where the policy needs one."""
        return self.backend.policy.label

    @policy.setter
    def policy(self, label: str) -> None:
        policy = self._known(label)
        own = self.manifest.catalyst_of(policy)
        if not self._asked or not (self._catalyst.size or policy.can_be_blind):
            self._catalyst = self._fitting(self._ids(own))
        self.backend.policy = policy

    def _known(self, label: str) -> PolicyFacts:
        if label not in self._opened:
            raise PotexportError(
                f"the session has not opened the policy {label!r}; it has "
                f"{', '.join(self._opened)}: name it to Session.open"
            )
        return self._opened[label]

    @property
    def stats(self) -> Stats:
        return replace(self._stats, fill=self.backend.pot.fill)

    @property
    def catalyst(self) -> Ids:
        """The tokens whose attention scores the pot, (n,) int32."""
        return self._catalyst

    def set_catalyst(self, prompt: str | Sequence[int] | Ids, *, default: bool = False) -> int:
        """Choose what the pot is scored by: a general instruction, or the user's question if it is
        known.

        Nothing ("") is for policies that can do without. Returns how many tokens did not fit the
        bundle's catalyst width; the last ones are used. default: only where none was chosen, and if
        it is not empty.
        """
        ids = self._ids(prompt)
        if default and (self._asked or not ids.size):
            return 0
        needed = "mass" in self.backend.policy.needs
        if needed and not ids.size and not self.backend.policy.can_be_blind:
            raise PotexportError(
                "the catalyst is empty; give the question, or a general instruction, to score the "
                "pot by"
            )
        self._asked = not default
        self._catalyst = self._fitting(ids)
        return ids.size - self._catalyst.size if needed else 0

    def _fitting(self, ids: Ids) -> Ids:
        return ids[max(0, ids.size - self.manifest.pot.catalyst_width) :]

    def feed(
        self,
        prompt: str | Sequence[int] | Ids,
        *,
        trusted: bool = True,
        to_come: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read any number of tokens; what is read does not depend on how it is cut into calls.

        Args:
            prompt: text, encoded without BOS or EOS; or token ids.
            trusted: special tokens written in the text, such as `<|im_end|>`, count as such. False
                reads them as letters: for a document, and for whatever strangers wrote.
            to_come: how many tokens will follow, the answer included, if that is known. The last
                compressions then keep as much as still fits, and not only `keep`.
            on_progress: called with (tokens of this call read, all of them) after each chunk; the
                last ones wait for what follows.
        """
        ids = self._ids(prompt, trusted=trusted)
        self._append(ids)
        self._fed += ids.size
        self._to_come = to_come
        while self._pending.size > self.manifest.pot.chunk:
            self._read(self.manifest.pot.chunk)
            if on_progress:
                on_progress(max(0, ids.size - self._pending.size), ids.size)

    @property
    def pinned(self) -> int:
        """How many of the first tokens stay through every compression."""
        return self.backend.pot.pinned

    def pin(self) -> int:
        """Let all that was fed so far, a system prompt say, stay through every compression from now
        on; returns how many tokens that is. `reset` lets go of them.

        Layers with a sliding window hold the last tokens alone, whatever is pinned. Raises
        PotexportError where a compression has already dropped some of it, and where it would leave
        no room for the `keep` slots that a compression keeps.
        """
        pot = self.backend.pot
        count = min(pot.counts_of(pot.fills)) + self._pending.size
        keeping.check_pin(self.manifest.pot, self.keep, count, lost=self.length - count)
        pot.pinned = count
        return count

    def generate(
        self,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Token]:
        """Continue what was read, token by token, until an end token, a stop string or the limit.

        The prompt need not fit the pot, nor the answer: the pot is compressed whenever it is full.
        What was generated becomes part of what was read. Raises PotexportError if nothing was.
        """
        check_limit(max_new_tokens)
        if not self._pending.size:  # now, and not when the first token is asked for
            raise PotexportError("there is nothing to continue; feed at least one token first")
        return generated(self, max_new_tokens, Sampler(sampling or Sampling()), StopStrings(stop))

    @property
    def chat(self) -> Chat:
        """Talk: `session.chat(messages)` answers, and reads only what is new of a conversation; see
        `Chat.__call__`."""
        return Chat(self)

    @property
    def length(self) -> int:
        """How many tokens were fed and generated since the last `reset`, waiting ones included."""
        return self._stats.tokens_read + self._fed + self._stats.tokens_generated

    def logits(self) -> Array:
        """Read all that is pending; (V,) float32 logits of the token after it.

        The array is valid until the next call. Go on with `accept`, or `feed`.
        """
        if not self._pending.size:
            raise PotexportError("there is nothing to continue; feed at least one token first")
        if self._pending.size > 1:
            self._read(self._pending.size - 1)
        self._make_room(1)
        started = perf_counter()
        self._last = self.backend.decode(int(self._pending[0]), self._novelty)
        self._take(1)
        self._to_come = None  # the prompt is over: its known length says nothing about what follows
        self._count(generate_seconds=perf_counter() - started)
        return self._last

    def accept(self, token: int) -> None:
        """Take a token, drawn from the last `logits`, for the next one to read."""
        if self._last is None:
            raise PotexportError("there are no logits to accept a token for; call logits first")
        started = perf_counter()
        self._append(np.array([token], np.int32))
        self._count(tokens_generated=1, generate_seconds=perf_counter() - started)

    def _append(self, ids: Ids) -> None:
        """Queue tokens; the first after `logits` gets its novelty from them."""
        if ids.size and self._last is not None:
            needed = "novelty" in self.manifest.layout.gathered
            self._novelty = surprise(self._last, int(ids[0])) if needed else 0.0
            self._last = None
        self._pending = np.concatenate([self._pending, ids])

    def snapshot(self) -> State:
        """All that was read, in memory; `restore` goes on from there, any number of times."""
        last = None if self._last is None else self._last.copy()
        read = self.backend.pot.save(), self._pending.copy(), self._fed, self._novelty, last
        return State(*read, self._to_come, self._tail.copy(), self._stats, self.said)

    def restore(self, state: State) -> None:
        """Go back to a snapshot of a session with the same bundle. Catalyst, policy and `keep` stay
        as they are now."""
        self.backend.pot.load(state.pot)
        self._pending, self._fed, self._novelty = state.pending, state.fed, state.novelty
        self._last = None if state.last is None else state.last.copy()
        self._to_come, self._tail, self._stats = state.to_come, state.tail, state.stats
        self.said = state.said

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep all that was read, and the settings, in a file, which takes the place of an older
        one when it is complete.

        Raises PotexportError where it cannot be written, or would replace a file of another kind.
        """
        write_session(path, self.manifest, self.snapshot(), self.settings())

    def load(self, path: str | os.PathLike[str], *, policy: str | None = None) -> None:
        """Go on from what `save` wrote for this bundle, with its policy (or `policy`), `keep`,
        catalyst and note.

        Raises PotexportError for a file that is missing, damaged or of another bundle, and for a
        policy that was not opened; the session is then as it was.
        """
        state, settings = read_session(path, self.manifest, self.backend.pot)
        self.use(settings, policy)
        self.restore(state)

    def fork(self) -> Session:
        """A second session over the same graphs, which has read what this one has, and reads on by
        itself. It costs one pot. Run one at a time; who closes one backend closes both."""
        twin = Session(self.manifest, self.backend.fork(), self.text, list(self._opened.values()))
        twin.use(self.settings())
        twin.restore(self.snapshot())
        return twin

    def settings(self) -> Settings:
        """What `restore` leaves alone, for `use`."""
        asked, catalyst = self._asked, self._catalyst
        return Settings(self.policy, self.keep, self.keep_mass, asked, catalyst, self.note)

    def use(self, settings: Settings, policy: str | None = None) -> None:
        """Compress as `settings` says; policy: in place of its own."""
        label = self._known(policy or settings.policy).label
        self.keep, self.keep_mass, self.note = settings.keep, settings.keep_mass, settings.note
        self._asked, self._catalyst = settings.asked, settings.catalyst
        self.policy = label
        if label == settings.policy:  # also a catalyst that nobody asked for: a chat's last message
            self._catalyst = settings.catalyst

    def _read(self, count: int) -> None:
        """Put the first `count` pending tokens into the pot; one more must be pending behind
        them."""
        self._make_room(count)
        started = perf_counter()
        ids, next_ids = self._pending[:count], self._pending[1 : count + 1]
        self._novelty = self.backend.prefill(ids, next_ids, self._novelty)
        self._take(count)
        self._count(read_seconds=perf_counter() - started)

    def _take(self, count: int) -> None:
        """Count the first pending tokens as read, the generated ones among them aside."""
        if any(policy.window for policy in self.manifest.policies):
            width = self.manifest.pot.catalyst_width
            self._tail = np.concatenate([self._tail, self._pending[:count]])[-width:]
        self._pending = self._pending[count:]
        fed = min(self._fed, self._pending.size)
        self._count(tokens_read=self._fed - fed)
        self._fed = fed

    def _make_room(self, count: int) -> None:
        """Compress if `count` more tokens do not fit."""
        if count <= self.backend.pot.room:
            return
        least: int | None = None
        if self._to_come is not None:
            least = self.manifest.pot.slots - self._pending.size - self._to_come
        self._compress(self.keep, least)

    def compress(self, keep: int | None = None) -> None:
        """Keep the best slots now, `keep` of them (`self.keep` otherwise); the loop does this by
        itself."""
        self._compress(self.keep if keep is None else keep, None)

    def _compress(self, keep: int | Literal["auto"], least: int | None) -> None:
        geometry, started = self.manifest.pot, perf_counter()
        kept = compressing.compress(
            self.backend,
            geometry,
            keep=keep,
            share=self.keep_mass,
            least=least,
            catalyst=self._catalyst,
            tail=self._tail,
        )
        if geometry.recent < self._tail.size:
            self._tail = self._tail[self._tail.size - geometry.recent :]
        self._count(compressions=1, compress_seconds=perf_counter() - started)
        if self.on_compress:
            self.on_compress(kept)

    def check_keep(self) -> None:
        """Raise PotexportError for a `keep` that no compression could take, before one tries."""
        geometry, policy = self.manifest.pot, self.backend.policy
        keeping.check(geometry, policy, self.keep, self.keep_mass, self.pinned)

    def _ids(self, prompt: str | Sequence[int] | Ids, *, trusted: bool = True) -> Ids:
        ids = self.text.encode(prompt, trusted=trusted) if isinstance(prompt, str) else prompt
        return token_ids(ids, self.manifest.model.vocab_size)

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )
