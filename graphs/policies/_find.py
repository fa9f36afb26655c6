"""From a policy's name and settings to the policy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from potexport import plugins
from potexport.errors import PotexportError
from potexport.graphs.policies import Policy

PACKAGE = "potexport.graphs.policies"


def policy_class(name: str) -> type[Policy]:
    """The one subclass of Policy that the policy's file defines."""
    module = plugins.load(PACKAGE, name)
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and issubclass(v, Policy)
    ]
    if len(found) != 1:
        raise TypeError(
            f"{module.__name__} defines {len(found)} policies; a policy file has exactly one"
        )
    return found[0]


def make_policy(name: str, settings: dict[str, Any]) -> Policy:
    """A policy with those of its settings that are not None; PotexportError for a setting that it
    does not have."""
    kind = policy_class(name)
    known = [field.name for field in fields(kind)]
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in known:
            has = f"it has {', '.join('--' + k for k in known)}" if known else "it has no settings"
            raise PotexportError(f"--{key} does not apply to the policy {name}; {has}")
    return kind(**given)
