"""Text to ids and back, and the chat template between a question and a prompt.

This file decides what a tokenizer folder may hold and when generated text is safe to print. How a
template is kept in bounds is decided in `template.py`. It draws no tokens and knows no graphs.
"""

from __future__ import annotations

import secrets
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potexport import strict
from potexport.errors import PotexportError
from potexport.runtime.control import Controls, encoding
from potexport.runtime.template import (
    Message,
    compile_template,
    one_line,
    plain_data,
    render,
    without_none,
)
from potexport.runtime.tokenizer import guarded, open_tokenizer

# Bytes of a file; the largest that are known have a quarter of it, or less.
LARGEST = {
    "tokenizer.json": 128 << 20, "tokenizer_config.json": 16 << 20, "chat_template.jinja": 1 << 18
}  # fmt: skip
HELD_TOKENS = 32  # a character has at most 4 bytes: this many tokens without one are garbage


class Text:
    """A tokenizer and, if the model has one, its chat template. Safe to share between threads."""

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None, specials: Mapping[str, str]
    ) -> None:
        """specials: the token strings that templates use, such as `bos_token`."""
        # It may carry the settings of its training; they would cut or pad a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._source = template
        self.specials = dict(specials)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def open(cls, folder: str | Path, names: Container[str] | None = None) -> Text:
        """Read `tokenizer.json`, and where present `chat_template.jinja`, `tokenizer_config.json`.

        names: of the files that are there, whatever else lies in the folder.
        Raises PotexportError, naming the file, for one that is missing or broken. A template needs
        the config: without its token strings it would quietly render another prompt.
        """
        folder = Path(folder)

        def has(name: str) -> bool:
            return (folder / name).exists() if names is None else name in names

        tokenizer = open_tokenizer(folder / "tokenizer.json", _read(folder / "tokenizer.json"))
        template_file = folder / "chat_template.jinja"
        template = _read(template_file) if has(template_file.name) else None
        config_file = folder / "tokenizer_config.json"
        if template is None and not has(config_file.name):
            return cls(tokenizer, template=None, specials={})
        config = _read_config(config_file)
        if template is None:  # models saved before 2025 keep it in the config
            template = _old_template(config)
        return cls(tokenizer, template=template, specials=_specials(config))

    @property
    def has_template(self) -> bool:
        return self._source is not None

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, such as "<|im_end|>"; None if there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(
        self, text: str, *, special: bool = False, trusted: bool = True
    ) -> NDArray[np.int32]:
        """Ids of `text`, [n] int32.

        Args:
            special: add the BOS and EOS of the tokenizer's own post-processor. Rendered chats
                already hold theirs.
            trusted: read special tokens written in the text, such as `<|im_start|>`, as such.
                False reads them as ordinary letters: for documents and whatever strangers wrote.
                Added tokens not marked special (runs of spaces, `<tool_call>`) stay tokens.
        Raises PotexportError for text with lone surrogates, which is not Unicode.
        """
        tokenizer = self._tokenizer if trusted else self.controls.tokenizer
        return np.array(encoding(tokenizer, text, special=special).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; ids that stand for no token give nothing."""
        with guarded():
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def stream(self, after: Iterable[int] = ()) -> Stream:
        """An incremental `decode` for ids that follow the ids `after` (a raw prompt's last few)."""
        return Stream(self._tokenizer, self.special_ids, after=after)

    def chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt that the model's template makes of `messages`.

        Args:
            messages: each with a "role" and a "content"; keys that hold None are left out.
            extra: further variables for the template, such as `tools` or `enable_thinking`.
        Encode the result with `trusted=True`, which also trusts what the messages say.
        Raises PotexportError if there is no template, or it refuses, fails, or grows out of bounds.
        """
        if self._template is None:
            raise PotexportError("the model has no chat template; give it a raw prompt instead")
        given = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.specials,
            **extra,
            "messages": [without_none(message) for message in messages],
        }
        return render(self._template, plain_data(given))

    def frame(self, system: str | None, before: str, after: str, **extra: Any) -> tuple[str, str]:
        """What stands before and after a document in a chat: (head, tail).

        The user's message is `before` + document + `after`; only a placeholder is rendered, so a
        book costs nothing, and nothing in it can act on the template. The document's own outer
        blanks stay, even if the template strips messages and `before` or `after` is empty.
        Encode head and tail with `trusted=True`, the document with `trusted=False`.
        Raises PotexportError as `chat` does, and if the placeholder does not come out once and
        intact: then render the whole message with `chat`.
        """
        # Unguessable, so that no text contains it; both cases, so that a change of case shows.
        mark = f"pOtDocument{secrets.token_hex(16)}"
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": before + mark + after})
        parts = self.chat(messages, **extra).split(mark)
        if len(parts) != 2:
            fate = "dropped or altered" if len(parts) == 1 else f"repeated {len(parts) - 1} times"
            raise PotexportError(
                f"the chat template {fate} a placeholder in the user's message; "
                "render the whole message instead"
            )
        return parts[0], parts[1]

    @cached_property
    def controls(self) -> Controls:
        """What tells control tokens from letters; toggling the one tokenizer would race with
        threads."""
        return Controls(self._tokenizer, self.specials.values())

    @cached_property
    def _template(self) -> jinja2.Template | None:
        return None if self._source is None else compile_template(self._source)


class Stream:
    """Ids one by one to text that never ends within a character; made by `Text.stream`.

    All pieces and the flush together equal `Text.decode` of all ids, except that malformed bytes
    may give another number of U+FFFD, and byte fallback's decoder also takes back the characters
    before them, which were said. `tokenizers` has a DecodeStream of its own; it cannot be
    flushed, raises on malformed byte-fallback runs, and keeps every special token it has seen.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_ids: frozenset[int], *, after: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # Decoders treat a first token differently (its space goes), so some printed ids stay.
        self._printed = [i for i in map(int, after) if self._has_text(i)][-HELD_TOKENS:]
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        if self._has_text(token):
            self._pending.append(int(token))
            text = self._new_text()
            # Half a character decodes to U+FFFD; a real U+FFFD only waits for the next token.
            whole = text and not text.endswith("\ufffd")
            if whole or len(self._pending) >= HELD_TOKENS:
                self._printed, self._pending = self._pending, []
                return text
        return ""

    def flush(self) -> str:
        """What is still held back, U+FFFD where a character stayed incomplete."""
        text = self._new_text() if self._pending else ""
        self._printed, self._pending = [*self._printed, *self._pending][-HELD_TOKENS:], []
        return text

    def _has_text(self, token: int) -> bool:
        known = token >= 0 and self._tokenizer.id_to_token(token) is not None
        return known and token not in self._special_ids

    def _new_text(self) -> str:
        old = self._decode(self._printed)
        both = self._decode([*self._printed, *self._pending])
        # Malformed bytes can turn printed text into U+FFFD after the fact; it cannot be unsaid.
        return both[len(old) :] if both.startswith(old) else self._decode(self._pending)

    def _decode(self, ids: list[int]) -> str:
        with guarded():
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopStrings:
    """Cuts a text before the earliest occurrence of any stop string, however it is cut in pieces.

    It holds back an end that could become a stop string. Where one stop string lies within a
    possible longer one that began earlier, it waits for the longer one.
    Raises PotexportError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise PotexportError(f"stop strings are {stops!r}; expected a list of non-empty texts")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that is safe to print, whether a stop string ended it); ("", True) ever after."""
        if self.stopped:
            return "", True
        text = self._held + piece
        stop, start = self._first_stop(text), self._first_start(text)
        self.stopped = stop < len(text) and stop <= start
        cut = min(stop, start)
        self._held = "" if self.stopped else text[cut:]
        return text[:cut], self.stopped

    def flush(self) -> str:
        """What was held back, at the end of the text; cut if it holds a stop string after all."""
        text, self._held = self._held, ""
        stop = self._first_stop(text)
        self.stopped = self.stopped or stop < len(text)
        return text[:stop]

    def _first_stop(self, text: str) -> int:
        """Where the earliest stop string begins; the text's length if there is none."""
        return min((at for s in self._stops if (at := text.find(s)) >= 0), default=len(text))

    def _first_start(self, text: str) -> int:
        """Where the longest end begins that a stop string could begin with; else the length."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            end = text[at:]
            if any(s.startswith(end) for s in self._stops):
                return at
        return len(text)


def _read(path: Path) -> str:
    try:
        return strict.text(path, LARGEST[path.name])
    except FileNotFoundError as error:
        raise PotexportError(f"{path} is missing; copy the whole bundle again") from error
    except (OSError, ValueError) as error:
        raise PotexportError(f"{path} cannot be read: {one_line(error)}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = strict.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise PotexportError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise PotexportError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    return config


def _old_template(config: Mapping[str, Any]) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; a token is a string, or a dict with its settings and "content"."""
    tokens: dict[str, str] = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return tokens
