"""`potexport serve`, as OpenAI's own client meets it: a process of its own, on loopback."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat import ChatCompletionMessageParam as Message

from potexport.runtime.sampling import Sampling
from potexport.runtime.session import Session
from tests.e2e.helpers import Cli, assert_refused
from tests.load import FAULTS, LARGEST, Tally, crowd, scripts
from tests.serving import Running, serving

KEY = "correct-horse-battery"
ONE = ("--threads", 1)
# A random model's likeliest tokens are always the same; drawn ones tell one state from another.
WARM: Any = {"temperature": 1.0, "seed": 5}
QUESTIONS = ("Who walks there?", "And then?", "Why is that so?")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Room for two pots in memory."""
    state = tmp_path_factory.mktemp("state") / "new folder"
    with serving(bundle, *ONE, "--sessions", 2, "--state", state, "--max-tokens", 40) as running:
        yield running


@pytest.fixture(scope="module")
def strict(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a key, a short line and short bodies."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"another-key\n{KEY}\n")
    options = ("--api-key-file", keys, "--queue", 1, "--max-request-bytes", 300_000)
    with serving(bundle, *ONE, *options, key=KEY) as running:
        yield running


@pytest.fixture
def hand(bundle: Path) -> Session:
    return Session.open(bundle, threads=1)


def by_hand(hand: Session, messages: list[Message], tokens: int = 20) -> str:
    drawn = Sampling(**WARM)
    found = hand.chat(messages, max_new_tokens=tokens, sampling=drawn)
    return "".join(token.text for token in found)


def ask(server: Running, messages: list[Message], tokens: int = 20, **more: Any) -> ChatCompletion:
    asked: Any = {"max_tokens": tokens, **WARM, **more}
    with server.client() as client:
        found = client.chat.completions.create(
            model=server.server.model, messages=messages, **asked
        )
    assert isinstance(found, ChatCompletion)
    return found


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def read_of(answer: ChatCompletion) -> int:
    """Tokens that were read for it."""
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    return usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def counted(server: Running, name: str) -> float:
    """A number of /metrics."""
    request = urllib.request.Request(f"{server.url}/metrics")
    request.add_header("Authorization", f"Bearer {server.server.key}")
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_an_answer_is_that_of_the_session(server: Running, hand: Session, book: str) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, user(book[:900])]
    expected = by_hand(hand, messages)
    assert hand.stats.compressions > 3
    found = ask(server, messages)
    assert text_of(found) == expected
    assert found.usage is not None
    assert found.usage.prompt_tokens == hand.length - 20  # all that was fed
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (20, "length")
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=server.server.model,
                messages=messages,
                max_completion_tokens=20,
                **WARM,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 5
    assert (chunks[-1].usage, chunks[-2].choices[0].finish_reason) == (found.usage, "length")


def test_a_conversation_reads_only_what_is_new(server: Running, hand: Session, book: str) -> None:
    messages = [user(book[1000:1900])]
    for number, question in enumerate(QUESTIONS):
        found = ask(server, messages)
        assert text_of(found) == by_hand(hand, messages)
        assert read_of(found) < 60 or number == 0
        messages += [assistant(text_of(found)), user(question)]
    assert found.usage is not None
    assert found.usage.prompt_tokens > 300


def test_the_same_history_twice_and_a_fork(server: Running, hand: Session, book: str) -> None:
    """What one request makes of a history no other sees."""
    history = [user(book[2000:2300])]
    history += [assistant(text_of(ask(server, history)))]
    asked = [[*history, user(question)] for question in (*QUESTIONS, QUESTIONS[0])]
    found = [ask(server, each) for each in asked]
    again = []
    for each in asked:
        hand.reset()
        by_hand(hand, history[:1])
        again.append(by_hand(hand, each))
    assert [text_of(each) for each in found] == again
    assert again[0] == again[3] != again[1]
    assert all(read_of(each) < 60 for each in found[:2])  # the copy that both went on from


def test_to_disk_and_back(server: Running, hand: Session, book: str) -> None:
    """Four conversations in turns, in two pots."""
    said: list[list[Message]] = [[user(book[n : n + 400])] for n in range(0, 2000, 500)]
    expected: list[list[str]] = [[] for _ in said]
    for messages, answers in zip(said, expected, strict=True):
        hand.reset()
        spoken = list(messages)
        for question in QUESTIONS:
            answers.append(by_hand(hand, spoken))
            spoken += [assistant(answers[-1]), user(question)]
    before = counted(server, 'potexport_turns_total{origin="disk"}')
    for turn, question in enumerate(QUESTIONS):
        for messages, answers in zip(said, expected, strict=True):
            found = ask(server, messages)
            assert text_of(found) == answers[turn]
            assert turn == 0 or read_of(found) < 60
            messages += [assistant(text_of(found)), user(question)]
    assert counted(server, 'potexport_turns_total{origin="disk"}') - before >= 6
    assert counted(server, 'potexport_sessions{where="memory"}') == 2


def test_a_conversation_outlives_the_server(
    bundle: Path, hand: Session, book: str, tmp_path: Path
) -> None:
    messages = [user(book[:400])]
    options = (*ONE, "--state", tmp_path / "state")
    named: Any = {"extra_headers": {"X-Conversation-Id": "../../etc/passwd"}}
    with serving(bundle, *options) as first:
        messages += [assistant(text_of(ask(first, messages, **named))), user("Who?")]
        assert first.end() == 0
    saved = [path.name for path in (tmp_path / "state").glob("*.pot")]
    assert len(saved) == 1
    assert len(saved[0]) == 64 + 4
    with serving(bundle, *options) as second:
        found = ask(second, messages, **named)
        assert read_of(found) < 60
        by_hand(hand, messages[:1])
        assert text_of(found) == by_hand(hand, messages)
        # Another conversation of the same words is another one.
        anew = ask(second, messages, metadata={"conversation_id": "b"})
        assert read_of(anew) > 60
        spoken = " ".join(second.lines)
        assert "another address" not in spoken
        assert not any(word in spoken for word in ("Who?", "passwd", book[5:25]))


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"nonsense": 1}, "nonsense"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"metadata": {"conversation_id": "x" * 600}}, "conversation_id"),
    ],
    ids=str,
)
def test_what_is_refused(server: Running, asked: dict[str, Any], field: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **asked}
    status, answer = post(server, json.dumps(body).encode())
    assert status == 400
    assert field in answer["error"]["param"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]


def test_what_changes_nothing_is_taken(server: Running) -> None:
    asked = {"n": 1, "tools": [], "logprobs": False, "user": "a", "store": True, "stop": None}
    asked |= {"response_format": {"type": "text"}, "presence_penalty": 0, "seed": -4}
    asked |= {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}
    status, answer = post(server, json.dumps({**asked, "max_tokens": 10**9}).encode())
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 40  # --max-tokens


def test_sampling_and_stops(server: Running) -> None:
    messages = [user("hi")]
    first, same = (text_of(ask(server, messages, seed=7, top_p=0.9)) for _ in range(2))
    assert first == same != text_of(ask(server, messages, seed=8, top_p=0.9))
    whole = text_of(ask(server, messages, temperature=None, seed=None))
    assert whole == text_of(ask(server, messages, temperature=0))
    whole = text_of(ask(server, messages))
    stop = whole[3:6]
    cut = ask(server, messages, stop=[stop, "never"])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff{}", b'{"a": NaN}', b"[" * 100_000])
def test_no_json_is_refused(server: Running, body: bytes) -> None:
    status, answer = post(server, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def post(
    server: Running, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any]:
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {server.server.key}"}
    request = urllib.request.Request(f"{server.url}{path}", body, {**given, **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_doors(strict: Running, server: Running) -> None:
    """Keys, names of the host, types and sizes of bodies, addresses."""
    body = json.dumps({"messages": [user("x")], "max_tokens": 1}).encode()
    assert post(strict, body)[0] == 200
    assert post(strict, body, Authorization=f"Bearer {KEY}x")[0] == 401
    assert post(strict, body, Authorization="")[0] == 401
    with strict.client() as client, pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    assert post(strict, b" " * 300_001)[0] == 413
    assert post(strict, b" " * 3_000_000)[0] == 413
    assert post(server, body, Host="evil.example")[0] == 403
    assert post(server, body, **{"Content-Type": "text/plain"})[0] == 415
    assert post(server, body, "/v1/embeddings")[0] == 404
    assert post(server, body, "/v1/models")[0] == 405
    with server.client() as client:
        assert [each.id for each in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
            client.chat.completions.create(model="gpt-4", messages=[user("x")])
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer)["status"] == "ok"


def test_a_full_line_and_clients_that_leave(strict: Running, book: str) -> None:
    """One text is read for long, one waits, the third is sent away; when the first two have left,
    the line is free at once."""
    long: list[Message] = [user(book * 70)]

    async def scene() -> openai.RateLimitError:
        async with strict.server.client() as client:

            def start() -> asyncio.Task[Any]:
                create = client.chat.completions.create
                return asyncio.create_task(create(model="tiny", messages=long, max_tokens=1))

            first = start()
            await until(lambda: counted(strict, "potexport_running") == 1)
            second = start()
            await until(lambda: counted(strict, "potexport_queue_length") == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                await start()
            for each in (first, second):
                each.cancel()
        await until(lambda: counted(strict, "potexport_left_total") == 2)
        return refused.value

    error = asyncio.run(scene())
    assert int(error.response.headers["retry-after"]) >= 1
    assert error.code == "queue_full"
    assert text_of(ask(strict, [user("Who?")]))
    assert counted(strict, "potexport_running") == 0
    assert counted(strict, "potexport_tokens_read_total") < 50_000  # it stopped within the text


def test_an_answer_that_takes_too_long_to_end(bundle: Path, book: str, tmp_path: Path) -> None:
    """SIGTERM while a text is read: the client is told, and the server ends well."""
    options = (*ONE, "--grace", 0.1, "--state", tmp_path / "state")
    with serving(bundle, *options) as running:
        kept = text_of(ask(running, [user("Who?")]))

        async def scene() -> BaseException | None:
            async with running.server.client() as client:
                long = [user(book * 70)]
                create = client.chat.completions.create
                task = asyncio.create_task(create(model="tiny", messages=long))
                await until(lambda: counted(running, "potexport_running") == 1)
                running.process.terminate()
                (found,) = await asyncio.gather(task, return_exceptions=True)
            return found if isinstance(found, BaseException) else None

        error = asyncio.run(scene())
        assert isinstance(error, openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "ending")
        assert running.end() == 0
    with serving(bundle, *options) as again:
        assert read_of(ask(again, [user("Who?"), assistant(kept), user("So?")])) < 30


async def until(holds: Any) -> None:
    for _ in range(2000):
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def test_a_crowd_with_faults(
    bundle: Path, hand: Session, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 clients and as many faults at once, three times: each answer is right, no error is ours,
    and the last round leaves less behind than one refused body. `make soak` sees smaller leaks."""
    monkeypatch.setenv("POTEXPORT_API_KEY", KEY)
    tally, made = Tally(), scripts(hand, book, 8, turns=2)
    with serving(bundle, *ONE, "--sessions", 4, "--state-gb", 0.01, key=KEY) as running:
        taken = []
        for _ in range(3):
            asyncio.run(crowd(running.server, made, tally, clients=32, faults=32))
            taken.append(running.memory())
        for name in ("running", "queue_length"):
            assert counted(running, f"potexport_{name}") == 0
        assert running.end() == 0
        assert not [line for line in running.lines if " at " in line or "Traceback" in line]
    assert (tally.wrong, tally.right) == ([], 3 * 32 * 2)
    assert set(tally.faults.values()) == {3 * 32 // len(FAULTS)}
    assert taken[2] - taken[1] < LARGEST / 2, taken


def test_what_is_taken_is_refused(cli: Cli, bundle: Path, server: Running, tmp_path: Path) -> None:
    port = server.server.port
    assert_refused(cli("serve", bundle, "--port", port), f"cannot listen on 127.0.0.1, port {port}")
    arguments = server.process.args
    assert isinstance(arguments, list)
    state = arguments[arguments.index("--state") + 1]
    assert_refused(cli("serve", bundle, "--port", 0, "--state", state), "another server uses")
