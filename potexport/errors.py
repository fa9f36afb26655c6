"""The one exception that stands for a person's mistake."""

from __future__ import annotations


class PotexportError(Exception):
    """A person's mistake, said in one line; the command line exits with code 2.

    The message says what happened, what was expected, and what to do next. A bug of ours is
    never a PotexportError: it may crash. Chain causes with ``raise … from``.
    """


class ChatError(PotexportError):
    """The messages of a conversation, or what the chat template makes of them; nothing was read."""
