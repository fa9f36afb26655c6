"""Finding one-file plugins: policies and targets.

A plugin is a module of a package folder; its name is the file's, with `-` for `_`. Listing reads
file names only, and only the one asked for is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from potexport.errors import PotexportError


def names(package: str) -> list[str]:
    """The plugins of a package, such as "potexport.graphs.policies", in alphabetical order."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = {module.name for module in pkgutil.iter_modules(places) if not module.ispkg}
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import one plugin; PotexportError lists them all if there is none of that name."""
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1]
        raise PotexportError(
            f"there is no {name!r} among the {kind}; choose one of: {', '.join(known)}"
        )
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")
