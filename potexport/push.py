"""`push`: a bundle and the runtime onto an Android device by adb, and the self-test there.

Only what the manifest names is copied, and of this package only what runs a bundle: Python files,
nothing of Qualcomm's. All that is run can be printed as commands, so that a person without a device
at hand, or without adb, can do the same later.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potexport import bundle
from potexport.bundle import MANIFEST, Manifest
from potexport.errors import PotexportError

PLACE = "/data/local/tmp/potexport"
CODE = f"{PLACE}/.python"  # hidden, for bundles lie beside it
PACKAGE = Path(__file__).parent
# Of the package, what `runtime` imports besides itself; a test runs them by themselves.
MODULES = ("__init__.py", "errors.py", "geometry.py", "coding.py", "spec.py", "strict.py",
           "bundle.py")  # fmt: skip
NEEDS = ("numpy", "onnxruntime", "tokenizers", "jinja2")
TERMUX = "in Termux: pkg install python, then pip install " + " ".join(NEEDS)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pushed:
    """What was done. copied: names of the files, those already there left out; bytes: of these.

    selftest: the report of `runtime.selftest`, as JSON.
    """

    serial: str
    place: str
    copied: tuple[str, ...]
    bytes: int
    selftest: dict[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.selftest["passed"])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Copies:
    """What lies where: local files, and the folder of the device they go to."""

    files: tuple[Path, ...]
    to: str


def push(
    folder: Path,
    *,
    serial: str | None = None,
    backend: str = "auto",
    tell: Tell = lambda _: None,
    on_stage: Tell = lambda _: None,
) -> Pushed:
    """Copy a bundle to a device and test it there.

    Args:
        serial: of the device; may be left out where there is one only.
        tell: is given the commands, line by line, where a person must run them.

    Raises PotexportError for what the person can cure: adb, the device, its Python.
    """
    manifest = bundle.read(folder)
    bundle.check_files(folder, manifest)
    if manifest.program:
        raise PotexportError(
            "this bundle is for ExecuTorch, which on a phone is part of an app and not of Python; "
            "push takes bundles built with --runtime onnxruntime"
        )
    copies = plan(folder, manifest)
    try:
        device = Device(_adb(), serial)
        on_stage(f"copy to {device.serial}")
        copied = _copy(device, copies, manifest)
        on_stage(f"self-test on {device.serial}")
        found = _selftest(device, copies[-1].to, backend)
    except PotexportError:
        for line in commands(copies, serial=serial, backend=backend):
            tell(line)
        raise
    size = sum(path.stat().st_size for path in copied)
    return Pushed(device.serial, copies[-1].to, tuple(p.name for p in copied), size, found)


def plan(folder: Path, manifest: Manifest) -> list[Copies]:
    """The runtime's files, then the bundle's, the manifest last of all."""
    runtime = sorted((PACKAGE / "runtime").glob("*.py"))
    names = [*sorted(manifest.files), MANIFEST]
    return [
        Copies(tuple(PACKAGE / name for name in MODULES), f"{CODE}/potexport"),
        Copies(tuple(runtime), f"{CODE}/potexport/runtime"),
        Copies(
            tuple(folder.absolute() / name for name in names), f"{PLACE}/{folder.resolve().name}"
        ),
    ]


def commands(copies: Sequence[Copies], *, serial: str | None, backend: str) -> list[str]:
    """All that `push` does, for a shell; what is quoted once more is for the device's shell."""
    adb = ["adb", *(["-s", serial] if serial else [])]
    made = [[*adb, "shell", _mkdir(copies)]]
    made += [[*adb, "push", *map(str, each.files), f"{each.to}/"] for each in copies]
    made.append([*adb, "shell", _test(copies[-1].to, backend)])
    return ["# by hand, in a shell:", *map(shlex.join, made)]


def _mkdir(copies: Sequence[Copies]) -> str:
    return shlex.join(["mkdir", "-p", *(each.to for each in copies)])


def _test(place: str, backend: str, *extra: str) -> str:
    test = ["python3", "-m", "potexport.runtime.selftest", place, "--backend", backend, *extra]
    return f"cd {shlex.quote(CODE)} && {shlex.join(test)}"


def _adb() -> str:
    found = shutil.which("adb")
    if found is None:
        raise PotexportError(
            "adb is not installed, or not on PATH; install Android's platform-tools, then push "
            "again, or run the commands above where adb is"
        )
    return found


class Device:
    """One device, ready for commands."""

    def __init__(self, adb: str, serial: str | None) -> None:
        """Raises PotexportError, with what to do, unless there is exactly one, or the one asked
        for, and it lets itself be used."""
        self._adb = adb
        states = devices(adb)
        if serial is None and len(states) > 1:
            raise PotexportError(
                f"several devices are attached; choose one with --serial: {', '.join(states)}"
            )
        if serial is not None and serial not in states:
            raise PotexportError(
                f"there is no device {serial} among those attached: {', '.join(states) or 'none'}"
            )
        if not states:
            raise PotexportError(
                "no device is attached; switch on USB debugging in its developer options, connect "
                "it, and push again, or run the commands above"
            )
        self.serial = serial or next(iter(states))
        state = states[self.serial]
        if state == "unauthorized":
            raise PotexportError(
                f"device {self.serial} has not allowed this computer: unlock it, accept the "
                "question about USB debugging, and push again"
            )
        if state != "device":
            raise PotexportError(
                f"device {self.serial} is not ready (adb says: {state}); connect it again"
            )

    def run(self, *arguments: str) -> str:
        """What an adb command printed; PotexportError, with its last words, if it failed."""
        done = _run([self._adb, "-s", self.serial, *arguments])
        if done.returncode:
            raise PotexportError(f"adb {arguments[0]} failed: {_last_line(done)}")
        return done.stdout

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """A command in the device's shell, whatever its exit code."""
        return _run([self._adb, "-s", self.serial, "shell", command])


def devices(adb: str) -> dict[str, str]:
    """Serial -> state, of every attached device."""
    done = _run([adb, "devices"])
    if done.returncode:
        raise PotexportError(f"adb devices failed: {_last_line(done)}")
    # "* daemon started successfully" and the like may stand around the list.
    rows = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return {serial: state.strip() for serial, state in rows}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def _copy(device: Device, copies: Sequence[Copies], manifest: Manifest) -> list[Path]:
    """Copy what the device does not have already, and compare all of it; the files copied."""
    made = device.shell(_mkdir(copies))
    if made.returncode:
        raise PotexportError(f"the device refuses to make {PLACE}: {_last_line(made)}")
    done = []
    for each in copies:
        wanted = {
            path: manifest.files[path.name].sha256
            if each is copies[-1] and path.name in manifest.files
            else bundle.sha256(path)
            for path in each.files
        }
        missing = _differing(device, wanted, each.to)
        if missing:
            device.run("push", *map(str, missing), f"{each.to}/")
        for path in _differing(device, wanted, each.to) if missing else []:
            raise PotexportError(
                f"the device's copy of {path.name} differs (its SHA-256 is another); is its "
                "storage full? Push again"
            )
        done += missing
    return done


def _differing(device: Device, wanted: dict[Path, str], to: str) -> list[Path]:
    """Files whose SHA-256 on the device is not the wanted one, or which are not there."""
    names = shlex.join(path.name for path in wanted)
    lines = device.shell(f"cd {shlex.quote(to)} && sha256sum -- {names}").stdout.splitlines()
    # coreutils begins a line with a backslash where a name has one; our names have none.
    found = {name.strip(): digest for digest, _, name in (line.partition(" ") for line in lines)}
    return [path for path, digest in wanted.items() if found.get(path.name) != digest]


def _selftest(device: Device, place: str, backend: str) -> dict[str, Any]:
    """Run it with the device's Python; PotexportError says what that lacks."""
    if device.shell("command -v python3").returncode:
        raise PotexportError(
            f"the bundle is on the device, but adb's shell finds no python3 there; {TERMUX}, and "
            "run the last command above, what stands between its outer quotes, in Termux"
        )
    program = (
        "import importlib.util as u; "
        f"print(*(n for n in {NEEDS!r} if u.find_spec(n) is None), sep=', ')"
    )
    missing = device.shell(shlex.join(["python3", "-c", program])).stdout.strip()
    if missing:
        raise PotexportError(
            f"the bundle is on the device, but its python3 lacks {missing}; {TERMUX}, and push "
            "again"
        )
    done = device.shell(_test(place, backend, "--json"))
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        found["passed"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise PotexportError(
            f"the self-test ended on the device without a report: {_last_line(done)}"
        ) from error
    return found
