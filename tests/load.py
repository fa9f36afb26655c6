"""Many clients of a server at once, some of them broken; what each well-formed one must be told is
known beforehand. For a test of seconds and for `make soak`."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletionMessageParam as Message

from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session

TOKENS = 12  # of an answer
SEED = 1  # drawn, because a random model's likeliest tokens are always the same
SECONDS = 120.0  # for one client; it is stuck then
LARGEST = 9 << 20  # bytes, of a body that is refused


@dataclass(frozen=True)
class Script:
    """A conversation: what is asked, and what the session answers by hand."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def scripts(session: Session, text: str, count: int, *, turns: int = 3) -> list[Script]:
    """Conversations about pieces of a text, some longer than the pot, answered here and now."""
    draw, made = random.Random(0), []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        for _ in range(turns):
            begin, length = draw.randrange(len(text) // 2), draw.choice((5, 40, 300))
            messages.append({"role": "user", "content": text[begin : begin + length]})
            drawn = Sampling(temperature=1.0, seed=SEED)
            found = session.chat(messages, max_new_tokens=TOKENS, sampling=drawn)
            answer = "".join(token.text for token in found)
            messages.append({"role": "assistant", "content": answer})
        said = [each["content"] for each in messages]
        made.append(Script(tuple(said[0::2]), tuple(said[1::2])))
    return made


@dataclass
class Tally:
    """right: answers as expected. wrong: what was not. faults: by kind, done to the server."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    model: str
    key: str = "none-needed"

    def client(self, key: str | None = None) -> AsyncOpenAI:
        url = f"http://{self.host}:{self.port}/v1"
        http = DefaultAsyncHttpxClient(verify=False)  # certificates would be read for each client
        return AsyncOpenAI(
            base_url=url,
            api_key=key or self.key,
            max_retries=0,
            timeout=SECONDS,
            http_client=http,
        )


async def talk(server: Server, script: Script, tally: Tally, *, stream: bool) -> None:
    """A whole conversation, as an app would have it."""
    messages: list[Message] = []
    name = {"X-Conversation-Id": secrets.token_hex(8)}
    async with server.client() as client:
        for question, expected in zip(script.questions, script.answers, strict=True):
            messages.append({"role": "user", "content": question})
            found = await _answer(client, server.model, messages, name, stream=stream)
            if found != expected:
                tally.wrong.append(f"{found!r} in place of {expected!r}")
                return
            tally.right += 1
            messages.append({"role": "assistant", "content": found})


async def _answer(
    client: AsyncOpenAI, model: str, messages: list[Message], name: dict[str, str], *, stream: bool
) -> str:
    asked: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 1.0, "seed": SEED}
    asked |= {"model": model, "messages": messages, "extra_headers": name}
    if not stream:
        whole = await client.chat.completions.create(**asked)
        return whole.choices[0].message.content or ""
    chunks = await client.chat.completions.create(**asked, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


# Faults: each takes a server and leaves it as it should not be left.


async def leaves_mid_stream(server: Server) -> None:
    async with server.client() as client:
        asked: list[Message] = [{"role": "user", "content": "Tell me all. " * 40}]
        chunks = await client.chat.completions.create(
            model=server.model, messages=asked, max_tokens=TOKENS, stream=True
        )
        async with chunks:
            async for _ in chunks:
                break


async def leaves_before_the_answer(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Read this. " * 400}]}
    await _raw(server, _post(server, json.dumps(body).encode()), wait=0.02)


async def sends_garbage(server: Server) -> None:
    await _raw(server, secrets.token_bytes(400) + b"\r\n\r\n")


async def sends_half_a_body(server: Server) -> None:
    await _raw(server, _post(server, b'{"messages": [{"role": "user"', more=1000), wait=0.05)


async def sends_no_json(server: Server) -> None:
    assert b" 400 " in await _raw(server, _post(server, b'{"messages": [[[[' * 200))


async def has_a_wrong_key(server: Server) -> None:
    with suppress(APIError):
        async with server.client("sk-another-key") as client:
            await client.models.list()


async def sends_too_much(server: Server) -> None:
    assert b" 413 " in await _raw(server, _post(server, b" " * LARGEST))


async def asks_for_what_there_is_not(server: Server) -> None:
    assert b" 400 " in await _raw(server, _post(server, b'{"messages": [], "n": 3}'))


FAULTS: Sequence[Callable[[Server], Awaitable[None]]] = (
    leaves_mid_stream,
    leaves_before_the_answer,
    sends_garbage,
    sends_half_a_body,
    sends_no_json,
    has_a_wrong_key,
    sends_too_much,
    asks_for_what_there_is_not,
)


def _post(server: Server, body: bytes, *, more: int = 0) -> bytes:
    """more: bytes that are promised and do not come."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {server.host}\r\n"
        f"authorization: Bearer {server.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body) + more}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _raw(server: Server, data: bytes, *, wait: float = SECONDS) -> bytes:
    """What comes back within that time, before the connection is dropped."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(wait):
            return await reader.read()
    except TimeoutError:
        return b""
    finally:
        writer.transport.abort()


async def crowd(
    server: Server, scripts: Sequence[Script], tally: Tally, *, clients: int, faults: int
) -> None:
    """So many clients at once, each with a conversation, and as many faults between them."""

    async def broken(number: int) -> None:
        fault = FAULTS[number % len(FAULTS)]
        await asyncio.sleep(0.01 * number)
        await fault(server)
        tally.faults[fault.__name__] += 1

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        for number in range(clients):
            script = scripts[number % len(scripts)]
            group.create_task(talk(server, script, tally, stream=number % 2 == 0))
        for number in range(faults):
            group.create_task(broken(number))
