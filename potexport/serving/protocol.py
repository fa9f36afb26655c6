"""What a chat request may ask, and what is refused: bytes from strangers become an `Asked`.

A field that would change the answer and that a bundle cannot honour is refused by name; fields that
change nothing are taken and ignored. How answers look is decided in `answers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn

from potexport.errors import PotexportError
from potexport.runtime.sampling import Sampling
from potexport.runtime.text import StopStrings

Message = Mapping[str, str]  # a role and a content
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS, LONGEST_STOP, LONGEST_ID = 16, 500, 512  # strings; characters
DEEPEST = 16  # that variables of the template are nested
# What changes nothing here: they say who asks, what is kept elsewhere, and at what price.
IGNORED = frozenset(
    {"user", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "parallel_tool_calls"}
)
# What would change the answer, and the values that do not.
NEUTRAL: Mapping[str, Sequence[object]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
USED = frozenset(
    {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
    | {"temperature", "top_p", "top_k", "seed", "stop", "metadata", "chat_template_kwargs"}
)
# Of a message; the second kind is refused unless it is null or empty.
IN_MESSAGE, NOT_IN_MESSAGE = {"role", "content", "name"}, {"refusal", "annotations", "audio"}
# Names that `Session.chat` and the template's own variables have.
RESERVED = frozenset(
    {"self", "messages", "max_new_tokens", "sampling", "stop", "on_progress"}
    | {"add_generation_prompt", "tools", "documents"}
)


class ApiError(Exception):
    """A request that is not answered: its status, and what its sender is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message, param = _encodable(message), param and _encodable(param)
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "invalid_request_error"
        facts = {"message": message, "type": TYPES.get(status, kind), "param": param, "code": code}
        self.body = {"error": facts}


@dataclass(frozen=True)
class Served:
    """What a server offers.

    name: of the model. max_tokens: of an answer, also where none are asked for. temperature: where
    none is asked for.
    """

    name: str
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Asked:
    """A request, checked. messages: roles and contents alone. conversation: its id, if one is given
    in the body. variables: for the chat template."""

    messages: list[dict[str, str]]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    conversation: str | None
    variables: dict[str, Any]


def parse(body: bytes, served: Served) -> Asked:
    """Raises ApiError, which names the field, for whatever cannot be answered as it is asked."""
    given = _object(body)
    for name, value in given.items():
        _known(name, value)
    model = given.get("model", served.name)
    if model != served.name:
        raise ApiError(
            404,
            f"there is no model {_short(model)} here; use {served.name!r}",
            param="model",
            code="model_not_found",
        )
    stream = _boolean(given, "stream")
    options = _mapping(given, "stream_options")
    return Asked(
        messages=_messages(given.get("messages")),
        max_new_tokens=_limit(given, served.max_tokens),
        sampling=_sampling(given, served),
        stop=_stops(given.get("stop")),
        stream=stream,
        include_usage=stream and _boolean(options, "include_usage"),
        conversation=conversation_id(_mapping(given, "metadata").get("conversation_id")),
        variables=_variables(_mapping(given, "chat_template_kwargs")),
    )


def conversation_id(given: object) -> str | None:
    """As it was sent, in a header or in the metadata; None where there is none."""
    if given is None or given == "":
        return None
    if not isinstance(given, str) or len(given) > LONGEST_ID:
        _refuse("conversation_id", f"a conversation's id is a text of at most {LONGEST_ID} letters")
    return given


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON may hold, cannot be sent back."""
    return text.encode("utf-8", "replace").decode()


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8; expected one object") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is a JSON {type(given).__name__}; expected an object")
    return given


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _refuse(param: str, message: str, *, code: str | None = None) -> NoReturn:
    raise ApiError(400, message, param=param, code=code)


def _short(value: object) -> str:
    """A value from a request, as it is shown in a message."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"


def _known(name: str, value: object) -> None:
    if value is None or name in USED or name in IGNORED:
        return
    if name not in NEUTRAL:
        _refuse(
            name,
            f"{_short(name)} is not supported; leave it out (docs/serve.md lists what is)",
            code="unsupported_parameter",
        )
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
               for each in NEUTRAL[name]):  # fmt: skip
        _refuse(
            name,
            f"{name} = {_short(value)} is not supported; leave it out",
            code="unsupported_value",
        )


def _messages(given: object) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        _refuse("messages", "messages must be a list with at least one message")
    found = [_message(number, each) for number, each in enumerate(given)]
    if found[-1]["role"] == "assistant":
        _refuse("messages", "the last message is the assistant's own; end with what it answers")
    return found


def _message(number: int, given: object) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(given, dict):
        _refuse(where, f"{where} is no object; expected a role and a content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(ROLES)
        _refuse(f"{where}.role", f"{where}.role is {_short(role)}; expected one of {expected}")
    for name, value in given.items():
        if name not in IN_MESSAGE and value and not (name in NOT_IN_MESSAGE and not value):
            _refuse(f"{where}.{name}"[:80], f"{where} has {_short(name)}, which is not supported")
    return {"role": ROLES[role], "content": _content(f"{where}.content", given.get("content"))}


def _content(where: str, given: object) -> str:
    """A text, or the parts of one, each of which begins a line, as `Session.chat` takes them."""
    if isinstance(given, list) and given:
        given = "\n".join(_part(where, each) for each in given)
    if not isinstance(given, str):
        _refuse(where, f"{where} must be a text, or a list of parts of type text")
    try:
        given.encode()
    except UnicodeEncodeError:
        _refuse(where, f"{where} is not valid Unicode: it has half a surrogate pair")
    return given


def _part(where: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        _refuse(where, f"{where} has a part that is no text; images, audio and files are not read")
    return text


def _limit(given: Mapping[str, Any], most: int) -> int:
    """No request fails for length: what is asked for beyond `most` ends there."""
    asked = most
    for name in ("max_tokens", "max_completion_tokens"):
        value = given.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            _refuse(name, f"{name} is {_short(value)}; expected a whole number, 1 or more")
        asked = min(asked, value)
    return asked


def _sampling(given: Mapping[str, Any], served: Served) -> Sampling:
    chosen = {name: given[name] for name in ("top_p", "top_k") if given.get(name) is not None}
    temperature = given.get("temperature")
    seed = given.get("seed")
    if type(seed) is int:  # OpenAI's may be negative
        seed %= 1 << 64
    try:
        return Sampling(
            temperature=served.temperature if temperature is None else temperature,
            seed=seed,
            **chosen,
        )
    except (PotexportError, OverflowError) as error:
        message = str(error)
        _refuse(message.split(" ", 1)[0], message[:300])


def _stops(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in stops)
    ):
        _refuse(
            "stop",
            f"stop must be a text, or a list of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} "
            "letters",
        )
    StopStrings(stops)
    return tuple(stops)


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    name, taken = "chat_template_kwargs", sorted(RESERVED & set(given))
    if not _shallow(given, DEEPEST):
        _refuse(name, f"{name} is nested more than {DEEPEST} deep")
    if taken:
        _refuse(name, f"{name} cannot set {taken[0]!r}; ask for it by its own field, if it has one")
    return dict(given)


def _shallow(value: object, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return most > 0 and all(_shallow(each, most - 1) for each in parts)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, f"{name} is {_short(value)}; expected true or false")
    return bool(value)


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name)
    if value is not None and not isinstance(value, dict):
        _refuse(name, f"{name} is {_short(value)}; expected an object")
    return value or {}


def chain(scope: str, messages: Sequence[Message]) -> Iterator[str]:
    """For the first 1, 2, … messages a digest that stands for all of them, in this scope."""
    digest = sha256(scope.encode("utf-8", "surrogatepass")).hexdigest()
    for message in messages:
        digest = link(digest, message)
        yield digest


def link(digest: str, message: Message) -> str:
    """The digest of one message more. Outer blanks of an answer do not count: clients trim them."""
    content = message["content"]
    said = content.strip() if message["role"] == "assistant" else content
    return sha256(json.dumps([digest, message["role"], said]).encode()).hexdigest()
