"""A bundle for `--target web` in headless Chromium beside Python: do they answer alike, how fast is
each, and what does the browser hold? Prints a table; `--picture` keeps one of the page.

Usage: python tests/bench/web.py BUNDLE TEXT --question Q [--characters N] [--cache DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from potexport import bundle as bundles
from potexport.runtime import reading
from potexport.runtime.reading import Document
from potexport.runtime.session import Session
from potexport.web import ort_web, serve
from tests.browser import Pipe, in_browser

HERE = Path(__file__).parents[1] / "e2e" / "web"
ANSWER = 200  # tokens, as the page has it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--characters", type=int, default=12000)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--flag", action="append", default=[], help="for Chromium")
    parser.add_argument("--backend", default="wasm")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")[: given.characters]
    mine = by_browser(given, text)
    theirs = by_python(given.bundle, text, given.question)
    same = mine["answers"][0] == theirs["answer"]
    print(json.dumps({"browser": mine, "python": theirs, "same answer": same}, indent=1))
    sys.exit(0 if same else 1)


def by_browser(given: argparse.Namespace, text: str) -> dict[str, Any]:
    browser = shutil.which(given.browser)
    if browser is None:
        sys.exit(f"there is no {given.browser}")
    ort = ort_web.find(keep=given.cache / f"onnxruntime-web-{ort_web.VERSION}")
    memory: dict[str, int] = {}

    def at_end(pipe: Pipe) -> None:
        memory["MB"] = largest(pipe.process.pid)
        if given.picture:
            given.picture.write_bytes(pipe.picture())

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = {"text": text, "questions": [given.question], "backend": given.backend}
        (folder / "hands.json").write_text(json.dumps(asked))
        page = (serve.PAGE / "index.html").read_text(encoding="utf-8")
        script = '<script type="module" src="hands.js"></script></body>'
        (folder / "index.html").write_text(page.replace("</body>", script))
        served = serve.files(given.bundle, bundles.read(given.bundle), ort)
        served |= {"/": folder / "index.html", "/hands.js": HERE / "hands.js"}
        served["/hands.json"] = folder / "hands.json"
        flags = ("--window-size=900,1180", *given.flag)
        told = in_browser(
            browser, served, "", folder / "p", flags=flags, seconds=3000, at_end=at_end
        )
    return {**told, "renderer's peak": memory["MB"]}


def largest(group: int) -> int:
    """The peak of resident memory of the largest process of Chromium's, MB."""
    peaks = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            stat = (path.parent / "stat").read_text().rpartition(")")[2].split()
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except (OSError, ValueError):
            continue  # it ended
        if int(stat[2]) == group and "VmHWM" in lines:
            peaks.append(int(lines["VmHWM"].split()[0]) // 1000)
    return max(peaks)


def by_python(folder: Path, text: str, question: str) -> dict[str, Any]:
    session = Session.open(folder)
    session.set_catalyst(question)
    around = reading.frame(session.text, question=question, system=None, raw=False)
    reading.read(session, Document.of(text), around, answer=ANSWER)
    answer = "".join(token.text for token in session.generate(max_new_tokens=ANSWER))
    stats = session.stats
    return {
        "answer": answer,
        "tokens": stats.tokens_read,
        "compressions": stats.compressions,
        "reading": round(stats.read_speed),
        "answering": round(stats.generate_speed),
    }


if __name__ == "__main__":
    main()
