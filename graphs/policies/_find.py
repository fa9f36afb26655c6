"""From a policy's name and settings to the policy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from potexport import plugins
from potexport.errors import PotexportError
from potexport.graphs.policies import Policy

PACKAGE = "potexport.graphs.policies"
TRUTH = {"true": True, "false": False}


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
            has = f"it has {', '.join(known)}" if known else "it has no settings"
            raise PotexportError(f"{key} does not apply to the policy {name}; {has}")
    return kind(**given)


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of what a person writes: "keydiff", "keydiff:pool=1,rotated=true", or
    "blend:keydiff + 2*catalyst"."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if name == "blend" and colon:
        return name, {"mix": rest.strip()}
    return name, settings_of(name, rest)


def settings_of(name: str, text: str) -> dict[str, Any]:
    """ "pool=1,rotated=true" -> values of the types that the policy's fields have."""
    kinds: dict[str, Any] = {
        field.name: type(field.default) for field in fields(policy_class(name))
    }
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise PotexportError(f"{part!r} of the policy {name} is no setting; write name=value")
        kind = kinds.get(key, str)
        try:
            found[key] = TRUTH[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise PotexportError(
                f"{key} of the policy {name} is {value!r}; it must be {wanted}"
            ) from error
    return found
