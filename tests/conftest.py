"""Threads: set before torch is imported. Tiny models are slower with two, and torch's idle threads
would spin beside ONNX Runtime's."""

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ALONE = {"test_families", "test_refused"}  # share nothing
# A folder's tests share what they build; these files share nothing with the others of theirs.
GROUPS = {f"parity/test_{name}" for name in ("smollm2", "policies", "coded", "shapes")}
GROUPS |= {"families/test_windows", "npu/test_smollm2", "executorch/test_delegates"}

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before anything loads Qualcomm's libQnnHtp: the other order crashes the process.
if importlib.util.find_spec("executorch") is not None:
    importlib.import_module("potexport.runtime.executorch_backend").binding()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="rare ones too; takes a while")
    parser.addoption("--families", metavar="FILE", help="write what was measured of each, as JSON")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run what shares fixtures (pytest-xdist with --dist loadgroup)."""
    for item in items:
        folder = item.path.parent.relative_to(HERE).as_posix()
        if folder != "unit" and item.path.stem not in ALONE:
            own = f"{folder}/{item.path.stem}"
            item.add_marker(pytest.mark.xdist_group(own if own in GROUPS else folder))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """pytest-xdist adds groups to names, which some versions of pytest silently ignore; then each
    process builds all that the other has built."""
    shared = [each for each in ids if "/e2e/" in each]
    if node.config.option.dist == "loadgroup" and any("@" not in each for each in shared):
        pytest.exit(
            f"groups of tests do not hold: pytest {pytest.__version__} and the installed "
            "pytest-xdist do not fit; install what constraints.txt says",
            returncode=4,
        )


_FOUND: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also of other processes' tests."""
    if report.when == "call":
        known = (each for name, each in report.user_properties if name == "family")
        _FOUND.extend({**each, "passed": report.passed} for each in known)  # type: ignore[dict-item]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--families")
    if path and not hasattr(session.config, "workerinput"):
        found = sorted(_FOUND, key=lambda each: json.dumps(each))
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
