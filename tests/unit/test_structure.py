"""The house itself: what may import what, what is packaged, how large files grow."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("potexport", "graphs", "runtime", "targets")


def _sources() -> list[Path]:
    """Every module once: `potexport/graphs` and its like are links to the folders beside it."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))
    return sorted(p for p in found if not any(parent.is_symlink() for parent in p.parents))


SOURCES = _sources()
# What the modules of a folder may import of the project; `potexport` itself may import all.
ALLOWED = {
    "graphs": {"errors", "geometry", "spec", "coding", "plugins", "graphs"},
    "runtime": {"errors", "geometry", "spec", "coding", "strict", "bundle", "runtime"},
    "targets": {"errors", "geometry", "spec", "plugins", "targets"},
}
FORBIDDEN = {
    "graphs": {"onnx", "onnx_ir", "onnxruntime", "executorch"},
    "runtime": {"torch", "transformers", "onnx", "safetensors"},
    "targets": {"torch", "transformers"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("**/*.py"):
        names = imports(path)
        heads = {name.split(".")[0] for name in names}
        assert not heads & FORBIDDEN[folder], path
        own = {name.split(".")[1] for name in names if name.startswith("potexport.")}
        assert own <= ALLOWED[folder], path


def test_every_package_is_packaged() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = {p.parent.relative_to(ROOT) for p in ROOT.glob("*/**/__init__.py") if p in SOURCES}
    # The links: `graphs` is imported as `potexport.graphs`.
    names = {
        ".".join(p.parts if p.parts[0] == "potexport" else ("potexport", *p.parts)) for p in tree
    }
    # optimum's namespace package, in which no file __init__.py may be.
    register = "optimum.commands.register"
    folder = config["package-dir"][register]
    assert [path.name for path in (ROOT / folder).glob("*.py")] == ["register_potexport.py"]
    assert set(config["packages"]) == names | {register}


def test_no_file_and_no_function_outgrows_the_house() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path}: {node.name}"


@pytest.mark.parametrize(
    "module", ["session", "onnxruntime_backend", "provider", "qnn_backend", "reading", "selftest"]
)
def test_the_runtime_needs_no_torch(module: str) -> None:
    """In a process of its own, where importing torch or transformers fails."""
    program = (
        "import sys\n"
        "sys.modules |= {name: None for name in ('torch', 'transformers', 'onnx', 'safetensors')}\n"
        f"import potexport.runtime.{module}\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_help_is_quick_to_import() -> None:
    program = (
        "import sys, potexport.cli\n"
        "heavy = {'torch', 'transformers', 'onnx', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
