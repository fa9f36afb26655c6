"""Who may ask: keys as OpenAI's clients send them, and by which names the server is called."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from potexport.errors import PotexportError
from potexport.serving.protocol import ApiError

VARIABLE = "POTEXPORT_API_KEY"
SHORTEST = 8  # letters
MAKE = "openssl rand -hex 16"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Keys:
    """Holds digests alone, and compares each in a time that does not tell how much was right."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Nothing asked is refused where there are none."""
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, path: Path | None, variable: str | None) -> Keys:
        """A key from each line of a file, and the one of the environment.

        Raises PotexportError for a file without any, and for a key that can be guessed.
        """
        keys = [] if path is None else _lines(path)
        keys += [variable.strip()] if variable and variable.strip() else []
        if any(len(key) < SHORTEST or not key.isascii() for key in keys):
            raise PotexportError(
                f"an API key must have at least {SHORTEST} letters of ASCII; make one with: {MAKE}"
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, header: str | None) -> str:
        """The name under which its conversations are kept; "" where no key is needed.

        header: of the field Authorization. Raises ApiError if the key is none of these.
        """
        if not self._digests:
            return ""
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(fits):
            raise ApiError(
                401,
                "a valid API key is needed; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return given.hex()


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PotexportError(f"the file of API keys {path} cannot be read: {why}") from error
    if not found:
        raise PotexportError(f"the file of API keys {path} is empty; write a key into it")
    return found


def host_of(header: str) -> str:
    """Of the field Host, without the port."""
    name = header.strip().lower()
    return name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
