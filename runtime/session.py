"""The loop: read any number of tokens into a pot of fixed size, and generate from it.

This file decides when to compress and what each token's novelty is; it knows neither files nor
graphs (`backend`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from potexport import bundle
from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.backend import Array, Backend
from potexport.runtime.provider import open_backend
from potexport.runtime.sampling import Sampler, Sampling, surprise
from potexport.runtime.text import StopStrings, Text

Ids = npt.NDArray[np.int32]


class Token(NamedTuple):
    """A generated token and the text it completes, which may be empty."""

    id: int
    text: str


@dataclass(frozen=True)
class Stats:
    """What a session has done. Seconds are of wall time."""

    tokens_read: int = 0  # fed ones; those still waiting for a full chunk come later
    tokens_generated: int = 0
    compressions: int = 0
    fill: int = 0  # slots that hold a token now
    read_seconds: float = 0.0  # prefill alone
    compress_seconds: float = 0.0  # catalyst and compression
    generate_seconds: float = 0.0  # decode and sampling, one decode for each prompt included

    @property
    def read_speed(self) -> float:
        """Tokens per second of reading, compressions included."""
        seconds = self.read_seconds + self.compress_seconds
        return self.tokens_read / seconds if seconds else 0.0

    @property
    def generate_speed(self) -> float:
        """Tokens per second of generating."""
        return self.tokens_generated / self.generate_seconds if self.generate_seconds else 0.0


class Session:
    """One conversation with one bundle. Memory and time per token do not depend on how much was
    read."""

    def __init__(self, manifest: Manifest, backend: Backend, text: Text) -> None:
        self.manifest, self.backend, self.text = manifest, backend, text
        self.on_compress: Callable[[list[Array]], None] | None = (
            None  # sees the kept slots, L x (Hkv, keep)
        )
        self._pending = np.empty(0, np.int32)  # not read yet: a chunk waits for the token after it
        self._fed = 0  # so many of them, the last ones, were fed and not generated
        self._novelty = 0.0  # of the first pending token; the very first token has none
        self._last: Array | None = None  # logits that nothing has followed yet
        self._to_come: int | None = None
        self._stats = Stats()
        self._catalyst = np.empty(0, np.int32)
        self.set_catalyst(manifest.catalyst)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        backend: str = "auto",
        soc: str | None = None,
        threads: int | None = None,
        check: bool = True,
    ) -> Session:
        """Load a bundle.

        Args:
            backend: "npu", "cpu", or "auto": the NPU if the bundle was compiled for this device's.
            soc: the chip to take the contexts of; this device's by default.
            threads: of graphs on the CPU; all that this process may use by default.
            check: compare every file's SHA-256 with the manifest; sizes are compared in any case.

        Raises PotexportError for a bundle that is missing, incomplete, altered or of a newer
        format.
        """
        manifest = bundle.read(folder)
        bundle.check_files(folder, manifest, digests=check)
        text = Text.open(os.fspath(folder))
        opened = open_backend(folder, manifest, on=backend, threads=threads or _cores(), soc=soc)
        return cls(manifest, opened, text)

    @property
    def stats(self) -> Stats:
        return replace(self._stats, fill=self.backend.pot.fill)

    @property
    def catalyst(self) -> Ids:
        """The tokens whose attention scores the pot, (n,) int32."""
        return self._catalyst

    def set_catalyst(self, prompt: str | Sequence[int] | Ids) -> int:
        """Choose what the pot is scored by: a general instruction, or the user's question if it is
        known.

        Returns how many tokens did not fit the bundle's catalyst width; the last ones are used.
        """
        ids = self._ids(prompt)
        if "mass" in self.manifest.policy.needs and not ids.size:
            raise PotexportError(
                "the catalyst is empty; give the question, or a general instruction, to score the "
                "pot by"
            )
        cut = max(0, ids.size - self.manifest.pot.catalyst_width)
        self._catalyst = ids[cut:]
        return cut if "mass" in self.manifest.policy.needs else 0

    def feed(
        self,
        prompt: str | Sequence[int] | Ids,
        *,
        to_come: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read any number of tokens; what is read does not depend on how it is cut into calls.

        Args:
            prompt: text, encoded without BOS or EOS and with special tokens recognised; or token
                ids.
            to_come: how many tokens will follow, the answer included, if that is known. The last
                compressions then keep as much as still fits, and not only `keep`.
            on_progress: called with (tokens of this call read, all of them) after each chunk; the
                last ones wait for what follows.
        """
        ids = self._ids(prompt)
        self._append(ids)
        self._fed += ids.size
        self._to_come = to_come
        while self._pending.size > self.manifest.pot.chunk:
            self._read(self.manifest.pot.chunk)
            if on_progress:
                on_progress(max(0, ids.size - self._pending.size), ids.size)

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
        if max_new_tokens < 1:
            raise PotexportError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not self._pending.size:  # now, and not when the first token is asked for
            raise PotexportError("there is nothing to continue; feed at least one token first")
        return self._generate(max_new_tokens, Sampler(sampling or Sampling()), StopStrings(stop))

    def _generate(self, limit: int, sampler: Sampler, stops: StopStrings) -> Iterator[Token]:
        stream = self.text.stream()
        for step in range(limit):
            token = sampler.pick(self.logits())
            self.accept(token)
            ends = token in self.manifest.eos_token_ids or step == limit - 1
            piece, stopped = stops.push(stream.push(token))
            if ends and not stopped:
                tail, stopped = stops.push(stream.flush())
                piece += tail if stopped else tail + stops.flush()
            yield Token(token, piece)
            if ends or stopped:
                return

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
            needed = "novelty" in self.manifest.policy.needs
            self._novelty = surprise(self._last, int(ids[0])) if needed else 0.0
            self._last = None
        self._pending = np.concatenate([self._pending, ids])

    def reset(self) -> None:
        """Forget everything that was read; the catalyst stays."""
        self.backend.pot.fill = 0
        self._pending, self._fed, self._novelty = np.empty(0, np.int32), 0, 0.0
        self._last = None
        self._to_come, self._stats = None, Stats()

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
        self._pending = self._pending[count:]
        fed = min(self._fed, self._pending.size)
        self._count(tokens_read=self._fed - fed)
        self._fed = fed

    def _make_room(self, count: int) -> None:
        """Compress if `count` more tokens do not fit."""
        pot = self.manifest.pot
        if self.backend.pot.fill + count <= pot.slots:
            return
        keep = pot.keep
        if self._to_come is not None:
            still_to_come = self._pending.size + self._to_come
            keep = min(pot.keep_max, max(keep, pot.slots - still_to_come))
        self.compress(keep)

    def compress(self, keep: int | None = None) -> None:
        """Keep the best slots now, `keep` of them (the bundle's default otherwise); the loop does
        this by itself."""
        pot = self.manifest.pot
        keep = pot.keep if keep is None else keep
        most = min(pot.keep_max, self.backend.pot.fill)
        if not pot.sink + pot.recent <= keep <= most:
            raise PotexportError(
                f"keep is {keep}; it must lie between sinks + recent ({pot.sink + pot.recent}) and "
                f"{most}"
            )
        started = perf_counter()
        if "mass" in self.manifest.policy.needs:
            self.backend.observe(self._catalyst)
        kept = self.backend.compress(keep)
        self._count(compressions=1, compress_seconds=perf_counter() - started)
        if self.on_compress:
            self.on_compress(kept)

    def _ids(self, prompt: str | Sequence[int] | Ids) -> Ids:
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            return np.empty(0, np.int32)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise PotexportError(
                f"token ids must be a flat list of whole numbers; found {ids.dtype} of {ids.ndim} "
                "dimensions"
            )
        size = self.manifest.model.vocab_size
        outside = ids[(ids < 0) | (ids >= size)]
        if outside.size:
            raise PotexportError(
                f"token id {outside[0]} is outside the vocabulary of {size}; use this bundle's own "
                "tokenizer"
            )
        return ids.astype(np.int32)

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )


def _cores() -> int:
    """The cores that this process may use; not all systems say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
