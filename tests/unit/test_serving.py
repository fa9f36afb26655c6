"""What a server makes of what strangers send, before any graph sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from potexport.errors import PotexportError
from potexport.serving import server as sockets
from potexport.serving.auth import Keys, host_of
from potexport.serving.protocol import NEUTRAL, USED, ApiError, Asked, Served, chain, parse
from potexport.serving.web import Limits, read_body

SERVED = Served("m", max_tokens=50, temperature=0.0)
FIELDS = sorted(USED | set(NEUTRAL) | {"user", "nonsense"})
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"])},
        optional={"content": st.text() | ANY, "name": ANY, "tool_calls": ANY},
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ANY, max_size=6),
    messages=MESSAGES | ANY,
    cut=st.none() | st.integers(0, 200),
)
def test_any_body_is_taken_or_refused_in_a_line(
    body: dict[str, Any], messages: object, cut: int | None
) -> None:
    text = json.dumps({**body, "messages": messages}).encode()[:cut]
    found: ApiError | Asked
    try:
        found = parse(text, SERVED)
    except ApiError as error:
        found = error
    if isinstance(found, ApiError):
        assert 400 <= found.status < 500
        sent = json.dumps(found.body, ensure_ascii=False).encode()  # as it is sent
        assert len(sent) < 1500
        assert "\n" not in str(found)
    else:
        assert found.messages[-1]["role"] in ("user", "system")
        assert 1 <= found.max_new_tokens <= 50
        json.dumps([each["content"] for each in found.messages], ensure_ascii=False).encode()


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("field", ["messages", "n", "nonsense", "stop", "chat_template_kwargs"])
def test_deep_bodies(field: str, depth: int) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": '
    body += '{"a":' * depth + "1" + "}" * (depth + 1)
    with pytest.raises(ApiError):
        parse(body.encode(), SERVED)


def parsed(**more: Any) -> Asked:
    given = {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]}
    return parse(json.dumps({**given, **more}).encode(), SERVED)


def test_what_is_taken() -> None:
    asked = parsed(
        max_tokens=7, stop="x", seed=-1, top_k=3, chat_template_kwargs={"thinking": True}
    )
    assert [each["role"] for each in asked.messages] == ["system", "user"]
    assert (asked.max_new_tokens, asked.stop, asked.stream) == (7, ("x",), False)
    assert (asked.sampling.seed, asked.sampling.top_k) == (2**64 - 1, 3)
    assert asked.variables == {"thinking": True}
    assert parsed(max_completion_tokens=90).max_new_tokens == 50
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parsed(messages=[{"role": "user", "content": content}]).messages[0]["content"] == "a\nb"
    assert parsed(stream=True, stream_options={"include_usage": True}).include_usage


def test_a_history_has_one_name() -> None:
    """Whatever is otherwise, but for blanks around an answer, makes another."""

    def name(*said: str, scope: str = "s") -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
        return list(chain(scope, messages))[-1]

    assert name("a", "b", "c") == name("a", " b\n", "c")
    others = [("a", "b", "c"), ("ab", "", "c"), ("a", "bc"), ("a", "b", " c"), ("a", "b", "c", "d")]
    names = {name(*said) for said in others} | {name("a", "b", "c", scope="t")}
    assert len(names) == len(others)  # the fourth of the last has no role, and the scope is new


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first-key\n\n second-key \n")
    keys = Keys.read(path, "third-key")
    owners = {keys.check(f"Bearer {key}") for key in ("first-key", "second-key", "third-key")}
    assert len(owners) == 3
    for header in (None, "", "first-key", "Basic first-key", "Bearer first-keyx", "Bearer \udcff"):
        with pytest.raises(ApiError) as refused:
            keys.check(header)
        assert refused.value.status == 401
    assert Keys.read(None, None).check(None) == ""
    with pytest.raises(PotexportError, match="at least 8 letters"):
        Keys.read(None, "short")


@pytest.mark.parametrize(
    ("header", "host"),
    [("localhost:80", "localhost"), ("[::1]:80", "::1"), ("A.b", "a.b"), ("", ""), ("[::1", "::")],
)
def test_hosts(header: str, host: str) -> None:
    assert host_of(header) == host


def body_of(*blocks: bytes, ends: bool = True, limit: int = 10) -> bytes:
    """What is read of a body that comes in these blocks, and ends, or never does."""
    left = [{"type": "http.request", "body": each, "more_body": True} for each in blocks]
    left += [{"type": "http.request", "body": b"", "more_body": False}] if ends else []

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    headers = [(b"content-type", b"application/json; charset=utf-8")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    limits = Limits(limit, body_seconds=0.05, hosts=None)
    return asyncio.run(read_body(Request(scope, receive), limits))


def test_bodies_end() -> None:
    assert body_of(b"12345", b"67890") == b"1234567890"
    with pytest.raises(ApiError) as late:
        body_of(b"12345", ends=False)
    assert late.value.status == 408
    for ends in (True, False):  # far beyond the limit the end is not waited for
        with pytest.raises(ApiError) as long:
            body_of(*[b"12345"] * 100, ends=ends)
        assert long.value.status == 413


async def talks_for_long(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:  # uvicorn drops what is sent to nobody
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        (b"", "HEADER_SECONDS"),  # a client that does not speak
        (b"GET / HTTP/1.1\r\nhost: x\r\n", "HEADER_SECONDS"),  # that does not end
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "DEAF_SECONDS"),  # that does not listen
    ],
)
def test_a_connection_ends(said: bytes, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other limit stays at a minute: it is not the one that ends it."""
    monkeypatch.setattr(sockets, limit, 0.05)
    config = uvicorn.Config(
        talks_for_long, http=sockets.Punctual, ws="none", lifespan="off", log_config=None
    )

    async def scene() -> None:
        server = uvicorn.Server(config)
        listening = sockets.listen("127.0.0.1", 0)
        running = asyncio.create_task(server.serve([listening]))
        _, writer = await asyncio.open_connection(*listening.getsockname()[:2], limit=1024)
        writer.write(said)
        while not server.server_state.connections:
            await asyncio.sleep(0.001)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        for task in server.server_state.tasks:
            task.cancel()
        server.should_exit = True
        await running

    asyncio.run(asyncio.wait_for(scene(), 20))
