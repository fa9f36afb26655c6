"""`potexport push`, with a stand-in for adb whose device is a folder: all but the phone is real.

The stand-in copies files, runs the commands of `adb shell` in a shell of this machine, with the
device's paths mapped into the folder, and has a python3 that sees nothing of this project but what
was pushed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from potexport import bundle as bundles
from potexport import push as pushing
from tests.e2e.helpers import Cli

ADB = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path({here!r})
arguments = sys.argv[1:]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps(arguments) + "\\n")
if arguments == ["devices"]:
    print("* daemon started successfully\\nList of devices attached")
    print((here / "devices.txt").read_text())
    sys.exit()
attached = [line.split("\\t")[0] for line in (here / "devices.txt").read_text().splitlines()]
if arguments[0] == "-s":
    assert arguments[1] in attached, arguments
    del arguments[:2]
device = lambda text: text.replace("/data/local/tmp", str(here / "device"))
if arguments[0] == "push":
    *files, to = arguments[1:]
    if (here / "full").exists():
        sys.exit("adb: error: failed to copy: remote No space left on device")
    for file in files:
        shutil.copyfile(file, os.path.join(device(to), os.path.basename(file)))
        if (here / "garble").exists() and file.endswith("weights.safetensors"):
            pathlib.Path(device(to), "weights.safetensors").write_bytes(b"garbled")
elif arguments[0] == "shell":
    path = os.pathsep.join([str(here / "bin"), "/usr/bin", "/bin"])
    if (here / "bare").exists():
        path = str(here / "bare")
    done = subprocess.run(["/bin/sh", "-c", device(" ".join(arguments[1:]))], env={{"PATH": path}})
    sys.exit(done.returncode)
"""
# Without `site`, no link of an editable install leads back into this project.
PYTHON = '#!/bin/sh\nPYTHONPATH={packages} exec {python} -S "$@"\n'


@dataclass(frozen=True)
class Phone:
    """What the stand-in keeps, and how to change it."""

    here: Path

    def attach(self, *rows: str) -> None:
        (self.here / "devices.txt").write_text("\n".join(rows))

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.here / "calls.jsonl").read_text().splitlines()]

    @property
    def files(self) -> set[str]:
        root = self.here / "device" / "potexport"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {
            str(path.relative_to(root)) for path in root.rglob("__pycache__/*")
        }


def _script(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    """One device, attached and allowed, with adb on PATH."""
    here = tmp_path / "phone"
    (here / "device").mkdir(parents=True)
    made = Phone(here)
    made.attach("emulator-5554\tdevice", "")
    _script(tmp_path / "tools" / "adb", ADB.format(python=sys.executable, here=str(here)))
    packages = sysconfig.get_paths()["purelib"]
    python = PYTHON.format(packages=packages, python=sys.executable)
    _script(here / "bin" / "python3", python)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")
    return made


def test_a_bundle_is_copied_and_tested_there(cli: Cli, bundle: Path, phone: Phone) -> None:
    done = cli("push", bundle, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["place"] == "/data/local/tmp/potexport/tiny.bundle"
    names = [check["name"] for check in report["selftest"]["checks"]]
    assert len(names) == 3
    assert all(name.startswith("cpu: ") for name in names)
    assert report["selftest"]["speeds"]["cpu"]["generate"] > 0
    assert "compressions wrong" in report["selftest"]["checks"][2]["found"]

    manifest = bundles.read(bundle)
    own = {name for name in phone.files if name.startswith("tiny.bundle/")}
    assert own == {f"tiny.bundle/{name}" for name in (*manifest.files, bundles.MANIFEST)}
    code = {name for name in phone.files if name.startswith(".python/")}
    assert code | own == phone.files
    assert ".python/potexport/runtime/selftest.py" in code
    assert all(name.endswith(".py") for name in code)
    assert {name for name in code if "/runtime/" not in name} == {
        f".python/potexport/{name}" for name in pushing.MODULES
    }
    pushes = [call for call in phone.calls() if "push" in call]
    assert pushes[-1][-2].endswith(bundles.MANIFEST)  # a half copied bundle has no manifest


def test_what_is_there_is_not_copied_again(cli: Cli, bundle: Path, phone: Phone) -> None:
    assert cli("push", bundle, "--json").exit_code == 0
    (phone.here / "device/potexport/tiny.bundle/decode.onnx").write_bytes(b"altered")
    again = cli("push", bundle)
    assert again.exit_code == 0, again.stderr
    assert "tiny.bundle on emulator-5554: 1 files copied" in again.stdout
    assert "✓" in again.stdout
    assert "cpu: read" in again.stdout


def test_the_printed_commands_do_the_same(
    cli: Cli, bundle: Path, phone: Phone, tmp_path: Path
) -> None:
    """Copied into a shell, with a blank and a bracket in the bundle's name."""
    odd = Path(shutil.copytree(bundle, tmp_path / "it's a [b] c"))
    phone.attach("")
    refused = cli("push", odd)
    assert refused.exit_code == 2
    assert "no device is attached" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    phone.attach("emulator-5554\tdevice")
    done = subprocess.run(["sh", "-e", "-c", refused.stdout], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    assert f"{odd.name}/{bundles.MANIFEST}" in phone.files


ONE = "emulator-5554\tdevice"
TWO = "R5CT10\tdevice"
REFUSALS = {
    "none": ([""], [], "no device is attached"),
    "several": ([ONE, TWO], [], "several devices are attached; choose one with --serial: emulator"),
    "unauthorized": (["R5CT10\tunauthorized"], [], "device R5CT10 has not allowed this computer"),
    "offline": (["R5CT10\toffline"], [], "device R5CT10 is not ready (adb says: offline)"),
    "rights": (["R5CT10\tno permissions (udev); see [http://x]"], [], "adb says: no permissions"),
    "unknown": ([ONE], ["--serial", "X1"], "there is no device X1 among those attached: emulator"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_device_that_cannot_be_used(cli: Cli, bundle: Path, phone: Phone, case: str) -> None:
    rows, options, says = REFUSALS[case]
    phone.attach(*rows)
    refused = cli("push", bundle, *options)
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert "adb" in refused.stdout.splitlines()[1]
    assert "runtime.selftest /data/local/tmp/potexport/tiny.bundle" in refused.stdout
    assert phone.calls() == [["devices"]]
    as_json = cli("push", bundle, *options, "--json")
    assert (as_json.exit_code, as_json.stdout) == (2, "")


def test_without_adb(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    refused = cli("push", bundle)
    assert refused.exit_code == 2
    assert "adb is not installed" in refused.stderr
    assert "adb push" in refused.stdout


def test_one_of_several_by_its_serial(cli: Cli, bundle: Path, phone: Phone) -> None:
    phone.attach(ONE, TWO)
    assert cli("push", bundle, "--serial", "R5CT10", "--json").exit_code == 0
    assert {tuple(call[:2]) for call in phone.calls()[1:]} == {("-s", "R5CT10")}


def _no_python(phone: Phone) -> None:
    """As adb's shell on most phones: there are mkdir and sha256sum, but no python3."""
    (phone.here / "bare").mkdir()
    for tool in ("mkdir", "sha256sum"):
        (phone.here / "bare" / tool).symlink_to(str(shutil.which(tool)))


def _no_tokenizers(phone: Phone) -> None:
    python = phone.here / "bin" / "python3"
    empty = phone.here / "nothing"
    python.write_text(PYTHON.format(packages=empty, python=sys.executable))


def _full(phone: Phone) -> None:
    (phone.here / "full").touch()


def _garble(phone: Phone) -> None:
    (phone.here / "garble").touch()


def _refuse(phone: Phone) -> None:
    (phone.here / "device" / "potexport").write_text("a file where a folder should be")


def _crash(phone: Phone) -> None:
    """An interpreter that dies in the self-test."""
    script = (
        '#!/bin/sh\ncase "$1" in -c) echo;; *) echo "Segmentation fault" >&2; exit 139;; esac\n'
    )
    (phone.here / "bin" / "python3").write_text(script)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_no_python, "the bundle is on the device, but adb's shell finds no python3"),
        (_no_tokenizers, "its python3 lacks numpy, onnxruntime, tokenizers, jinja2; in Termux"),
        (_full, "adb push failed: adb: error: failed to copy: remote No space left on device"),
        (_garble, "the device's copy of weights.safetensors differs"),
        (_refuse, "the device refuses to make /data/local/tmp/potexport"),
        (_crash, "the self-test ended on the device without a report: Segmentation fault"),
    ],
)
def test_what_goes_wrong_on_the_device(
    cli: Cli, bundle: Path, phone: Phone, fault: Callable[[Phone], None], says: str
) -> None:
    fault(phone)
    refused = cli("push", bundle)
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert "adb push" in refused.stdout


def test_a_failed_check_is_exit_code_1(cli: Cli, bundle: Path, phone: Phone) -> None:
    report: dict[str, object] = {
        "checks": [{"name": "c", "passed": False, "found": "f"}],
        "skipped": "npu: why",
    }
    report |= {"speeds": {}, "peak_memory": None, "passed": False}
    content = (
        f"#!/bin/sh\ncase \"$1\" in -c) echo;; *) echo '{json.dumps(report)}'; exit 1;; esac\n"
    )
    (phone.here / "bin" / "python3").write_text(content)
    done = cli("push", bundle)
    assert done.exit_code == 1
    assert "✗" in done.stdout
    assert "npu: why" in done.stdout


def test_a_damaged_bundle_is_not_copied(cli: Cli, copy: Path, phone: Phone) -> None:
    (copy / "decode.onnx").write_bytes(b"altered")
    refused = cli("push", copy)
    assert refused.exit_code == 2
    assert "decode.onnx is truncated" in refused.stderr
    assert not (phone.here / "calls.jsonl").exists()
