"""How answers look: one object, or a stream of chunks, with what was read and generated."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "length"]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """In tokens. prompt: of the whole conversation before the answer; cached: those among them that
    the session had read before, so that prompt - cached were read now."""

    prompt: int
    cached: int
    completion: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer:
    """One answer's id and time, which all its chunks share."""

    def __init__(self, *, model: str, fingerprint: str, include_usage: bool) -> None:
        """fingerprint: changes with the bundle, so that a seed means the same while it stays."""
        self._include_usage = include_usage
        self._same: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        same = {**self._same, "object": "chat.completion"}
        return {**same, "choices": [choice], "usage": usage.to_json()}

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": "", "refusal": None}, None)

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text}, None)

    def last(self, finish: Finish, usage: Usage) -> bytes:
        end = self._chunk({}, finish)
        if self._include_usage:
            end += self._event(choices=[], usage=usage.to_json())
        return end + DONE

    def _chunk(self, delta: dict[str, Any], finish: Finish | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._include_usage else {}
        return self._event(choices=[choice], **usage)

    def _event(self, **more: Any) -> bytes:
        return event({**self._same, "object": "chat.completion.chunk", **more})


def event(document: object) -> bytes:
    """One event of a stream, as server-sent events are written."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()
