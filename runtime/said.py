"""What was said in a conversation: plain data, which a saved session holds beside its pot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potexport.errors import PotexportError
from potexport.runtime.template import Message, one_line, plain_data, without_none

Plain = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """A conversation that a session has read and answered.

    messages: those that were given, as `plain_messages` makes them. variables: of the template.
    answer: to the last of them, as far as it was shown. length: `Session.length` by then; with any
    other the session has gone on without the conversation.
    """

    messages: tuple[Plain, ...]
    variables: Plain
    answer: str
    length: int

    @property
    def all(self) -> list[Plain]:
        """The messages, and the answer as one."""
        return [*map(dict, self.messages), {"role": "assistant", "content": self.answer}]

    def goes_on(self, messages: Sequence[Plain], variables: Plain) -> bool:
        """Whether these messages repeat the conversation, and may go on. Outer blanks of an answer
        may be gone, and what else stands beside it does not matter."""
        count = len(self.messages)
        if variables != self.variables or tuple(messages[:count]) != self.messages:
            return False
        answer = messages[count : count + 1]
        return bool(
            answer
            and answer[0]["role"] == "assistant"
            and answer[0].get("content", "").strip() == self.answer.strip()
        )

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Said:
        """Raises ValueError, or what Python raises of wrong types, for what `to_bytes` did not
        write."""
        try:
            found = json.loads(data)
        except RecursionError as error:
            raise ValueError from error
        answer, length = found["answer"], found["length"]
        variables, messages = found["variables"], tuple(plain_messages(found["messages"]))
        if type(answer) is not str or type(length) is not int or type(variables) is not dict:
            raise ValueError
        return cls(messages, variables, answer, length)


def plain_messages(messages: Sequence[Message]) -> list[Plain]:
    """Messages as templates take them: plain JSON data, every content a text.

    The texts of a content in parts stand in lines of their own. An answer without a content is
    empty, unless it called tools. PotexportError for what is no conversation, or is not text.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise PotexportError("a chat needs a list of messages, with at least one in it")
    found: list[Plain] = plain_data({"all": [_plain(each) for each in messages]})["all"]
    return found


def _plain(message: Message) -> Plain:
    made = without_none(message)
    role, content = made.get("role"), made.get("content")
    if not isinstance(role, str):
        raise PotexportError(
            f"a chat's message is {one_line(repr(message))}; expected a role and a content"
        )
    if isinstance(content, (list, tuple)):
        content = "\n".join(map(_text_of, content))
    elif content is None and role == "assistant" and not made.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        made["content"] = content
    elif content is not None or role != "assistant" or not made.get("tool_calls"):
        raise PotexportError(
            f"the content of a message of the role {one_line(role)} is {one_line(repr(content))}; "
            "expected text"
        )
    return made


def _text_of(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise PotexportError(
            f"a part of a message's content has the type {one_line(repr(kind))}; only parts of the "
            "type 'text' can be read"
        )
    return text
