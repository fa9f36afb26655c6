"""A process for work that may crash, hang, or run out of memory, and the sentence it then ends in.

The worker (`htp_worker`) gets its job as a file and reports in another; here it is started, watched
and ended.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from potexport.errors import PotexportError

REFUSED_SHOWN = 8
POLL = 0.2  # seconds between looks at what a worker reports
Progress = Callable[[int, int], None]


def work(
    job: dict[str, Any], *, timeout: float, on_progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Let a worker do a job; the lines that it reported, or a PotexportError with the reason.

    timeout: seconds from one report to the next.
    """
    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as folder:
        place = Path(folder)
        order, report, chatter = place / "job.json", place / "report.jsonl", place / "chatter.txt"
        order.write_text(json.dumps(job))
        report.touch()
        command = [sys.executable, "-m", "potexport.htp_worker", str(order), str(report)]
        with chatter.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                code = _watch(process, report, timeout, on_progress)
            finally:  # an interrupt must not leave a compiler behind
                process.kill()
                process.wait()
        lines = _lines(report)
        _check(job, lines, code, chatter, timeout)
        return lines


def _watch(
    process: subprocess.Popen[bytes], report: Path, timeout: float, on_progress: Progress
) -> int | None:
    """The worker's exit code; None if it reported nothing for `timeout` seconds."""
    seen, since = 0, monotonic()
    while True:
        try:
            return process.wait(min(POLL, timeout))
        except subprocess.TimeoutExpired:
            lines = _lines(report)
        if len(lines) > seen:
            seen, since = len(lines), monotonic()
            if "read" in lines[-1]:
                on_progress(lines[-1]["read"], lines[-1]["of"])
        elif monotonic() - since > timeout:
            return None


def _lines(report: Path) -> list[dict[str, Any]]:
    """What was reported so far; the last line may be half written."""
    text = report.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in text.splitlines()]


def _check(
    job: dict[str, Any], lines: list[dict[str, Any]], code: int | None, log: Path, timeout: float
) -> None:
    """Raise the PotexportError that says how a worker failed, if it did."""
    if code == 0 and lines and lines[-1].get("finished"):
        return
    last = lines[-1] if lines else {}
    first = job["graphs"][0] if job["do"] == "compile" else None
    graph = next((line["graph"] for line in reversed(lines) if "graph" in line), first)
    where = f"graph {graph}" if graph else "the loop"
    what = f"compiling {where} for {job['soc'][0]}" if job["do"] == "compile" else where
    if "refused" in last:
        nodes = last["refused"]
        shown = ", ".join(f"{kind} {name}" for name, kind in nodes[:REFUSED_SHOWN])
        more = f" and {len(nodes) - REFUSED_SHOWN} more" if len(nodes) > REFUSED_SHOWN else ""
        raise PotexportError(f"the HTP refuses {len(nodes)} nodes of {where}: {shown}{more}")
    if "mistake" in last:
        mistake = PotexportError(last["mistake"])  # a worker's, with its own row in docs/errors.md
        raise mistake
    if "failed" in last:
        raise PotexportError(f"{what} failed: {last['failed']}")
    if code is None:
        raise PotexportError(f"{what} took more than {timeout:.0f} s and was stopped")
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        hint = "; was memory short?" if -code == signal.SIGKILL else ""
        raise PotexportError(f"{what} crashed the process that did it ({name}){hint}")
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise PotexportError(f"{what} ended with code {code}: {' '.join(tail)[:300]}")
