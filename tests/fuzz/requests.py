"""Sends changed requests to a server of its own: `potexport serve`, a process on loopback.

python -m tests.fuzz.requests [BUNDLE] --seed 0 --cases 1000

Each request must be answered, or its connection closed, in time; the answer is never a server's
error; and the server answers an ordinary request afterwards, in as much memory as before.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.run import build
from tests.fuzz.values import change, damaged, dumped

MOST_SECONDS = 5.0
# Of the whole run: caches of answers and conversations fill first.
MOST_GROWTH = 128 << 20
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who jumps?"},
        {"role": "assistant", "content": "The fox."},
        {"role": "user", "content": [{"type": "text", "text": "Over whom?"}]},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["\n"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "metadata": {"conversation_id": "a"},
    "n": 1,
    "response_format": {"type": "text"},
}
HEADERS = (
    "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 1",
    "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Expect: 100-continue",
    "Authorization: Bearer \x80\xff", "Host: example.com", "X-Conversation-Id: ../../etc/passwd",
    "X-Conversation-Id: " + "x" * 5000, "Cookie: " + "x" * 20_000, "Content-Type: text/html",
)  # fmt: skip
PATHS = (CHAT, "/v1/models", "/v1/models/../../etc/passwd", "/health", "/metrics", "/", "/%00",
         CHAT + "?" + "a=b&" * 500, "/v1/models/" + "%ff" * 50)  # fmt: skip


def request(chance: random.Random) -> tuple[bytes, bool]:
    """One with something wrong about it, and whether all of it is there that it says is."""
    document: Any = json.loads(json.dumps(BODY))
    document["stream"] = chance.random() < 0.3
    for _ in range(chance.choice((1, 1, 2, 4))):
        document = change(document, chance)
    if isinstance(document, dict):  # an answer of many tokens is no fault, but takes its time
        most = document.get("max_tokens")
        document["max_tokens"] = 2 if type(most) is int and most > 2 else most
    body = dumped(document, chance)
    if chance.random() < 0.2:
        body = damaged(body, chance)
    path, method = CHAT, "POST"
    if chance.random() < 0.1:
        path, method = chance.choice(PATHS), chance.choice(("GET", "POST", "HEAD", "PUT", "BREW"))
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    more = [chance.choice(HEADERS)] if chance.random() < 0.1 else []
    if not any(line.startswith(("Content-Length", "Transfer")) for line in more):
        lines.append(f"Content-Length: {len(body)}")
    lines += [*more, "Connection: close", "", ""]
    whole = "\r\n".join(lines).encode("latin-1") + body
    if chance.random() < 0.1:
        return damaged(whole, chance), False
    return whole, not more


def send(port: int, data: bytes, *, patience: float) -> tuple[int | None, float]:
    """Status of the answer, None where there is none, and seconds. Where the server waits for more,
    it is left after so many, as a client that goes away leaves it."""
    started = time.monotonic()
    answer = b""
    with socket.create_connection(("127.0.0.1", port), patience) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionError:
            pass
        except TimeoutError:
            return None, time.monotonic() - started
    found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return int(found[1]) if found else None, time.monotonic() - started


def ordinary(port: int) -> bool:
    """Whether the server still does what it is for."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return send(port, head.encode() + body, patience=60)[0] == 200


def memory(process: int) -> int:
    """Bytes that it holds, without the pages of files that it maps."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found, status
    return int(found[1]) << 10


def run(server: subprocess.Popen[str], port: int, seeds: range) -> list[str]:
    """What was wrong, by seed."""
    wrong: list[str] = []
    counts: Counter[int | None] = Counter()
    before = memory(server.pid)
    for seed in seeds:
        data, complete = request(random.Random(seed))
        status, seconds = send(port, data, patience=MOST_SECONDS if complete else 0.3)
        counts[status] += 1
        if complete and seconds >= MOST_SECONDS:
            wrong.append(f"--seed {seed}: no answer after {seconds:.1f} s")
        elif status is not None and status >= 500:
            wrong.append(f"--seed {seed}: status {status}")
        if seed % 50 == 0 and not ordinary(port):
            wrong.append(f"--seed {seed}: no answer to an ordinary request afterwards")
    if server.poll() is not None:
        return [*wrong, f"the server ended with {server.returncode}"]
    growth = memory(server.pid) - before
    if growth > MOST_GROWTH:
        wrong.append(f"the server took {growth >> 20} MiB more")
    print(f"{dict(counts)}; {growth / 2**20:.1f} MiB more")
    return wrong


def serve(bundle: Path, seeds: range) -> list[str]:
    """Start a server, and send it the requests of these seeds."""
    command = [sys.executable, "-m", "potexport", "serve", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = None
        for line in server.stderr:
            if found := re.search(r"http://[^:]+:(\d+)", line):
                break
        if found is None:
            return ["the server did not start"]
        # Its lines go on; somebody must read them.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        return run(server, int(found[1]), seeds)
    finally:
        server.kill()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, help="built here if none is given")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
        bundle = asked.bundle or build(Path(room))[0]
        started = time.monotonic()
        wrong = serve(bundle, range(asked.seed, asked.seed + asked.cases))
    print("\n".join(wrong))
    print(f"{asked.cases} requests in {time.monotonic() - started:.0f} s: {len(wrong)} failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
