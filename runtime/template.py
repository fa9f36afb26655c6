"""Runs a model's chat template, which is somebody else's program.

It runs in jinja2's sandbox, sees plain JSON data only, and whatever it does wrong comes out as a
one-line PotexportError. What a prompt is used for is `text.py`'s matter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from potexport.errors import PotexportError

Message = Mapping[str, object]
Body = TypeVar("Body", nodes.For, nodes.Macro)

MAX_CHARS = 8_000_000  # of a rendered prompt; no phone's pot is fed more through a template
MAX_SECONDS = 10.0  # of rendering; a real template takes milliseconds
MAX_WIDTH = 100_000  # of padding, and jinja2's own limit for range()

_deadline: ContextVar[float] = ContextVar("_deadline", default=float("inf"))


def compile_template(source: str) -> jinja2.Template:
    """Raises PotexportError, with the line, for a template that is no jinja2."""
    try:
        sandbox = _Sandbox()
        return sandbox.from_string(_Bounded().visit(sandbox.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise PotexportError(
            f"the chat template is broken at line {error.lineno}: {one_line(error.message)}"
        ) from error
    except Exception as error:  # deep nesting ends in RecursionError, MemoryError, SyntaxError
        raise PotexportError(f"the chat template cannot be compiled: {one_line(error)}") from error


def one_line(error: object) -> str:
    """An error's text as one short printable line: a foreign file may have written it."""
    text = " ".join(str(error).split())
    text = "".join(c for c in text if c.isprintable())
    return text[:297] + "…" if len(text) > 298 else text or type(error).__name__


def render(template: jinja2.Template, given: Mapping[str, Any]) -> str:
    started = _deadline.set(time.monotonic() + MAX_SECONDS)
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**given):
            pieces.append(piece)
            size += len(piece)
            _check_size(size)
    except jinja2.exceptions.SecurityError as error:
        raise PotexportError(f"the chat template is not safe to run: {one_line(error)}") from error
    except jinja2.TemplateError as error:  # also what the template raises on purpose
        raise PotexportError(f"the chat template refused: {one_line(error)}") from error
    except Exception as error:  # a template is a program; it may raise whatever Python raises
        raise PotexportError(
            f"the chat template failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        _deadline.reset(started)
    return "".join(pieces)


def without_none(message: Message) -> dict[str, object]:
    """As transformers does: many templates would print a None where they cope without the key."""
    if not isinstance(message, Mapping):
        raise PotexportError(
            f"a chat's message is {one_line(repr(message))}; expected a role and a content"
        )
    return {key: value for key, value in message.items() if value is not None}


def plain_data(given: Mapping[str, object]) -> dict[str, Any]:
    """A copy made of JSON types only: other objects have methods the sandbox cannot judge."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise PotexportError(
            f"a chat's messages and variables must be plain JSON data: {one_line(error)}"
        ) from error
    return plain


class _Bounded(NodeTransformer):
    """Puts the clock into loops and macros, and a limit on `~`, which jinja2 cannot intercept."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("bounded_join")
        return nodes.Call(join, node.nodes, [], None, None, lineno=node.lineno)

    def _ticking(self, node: Body) -> Body:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """No names with underscores: an instance's `__call__` or `__html__` would escape the checks."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a keyword
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, set up as transformers does, with the obvious bombs bounded.

    No loader, so nothing is included or imported. What stays open: a template that means harm can
    waste memory within one operation (say, printing a list nested in itself many times over).
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run filters outside the clock
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        for name in ("batch", "center", "format", "indent", "slice", "wordwrap"):
            self.filters[name] = _narrow(self.filters[name])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _dict  # not the class, which has attributes
        del self.globals["lipsum"]  # text of any length

    def tick(self) -> str:
        if time.monotonic() > _deadline.get():
            raise jinja2.exceptions.SecurityError(f"it ran for more than {MAX_SECONDS:g} s")
        return ""

    def bounded_join(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    _check_size(len(many) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * right)
        result = super().call_binop(context, operator, left, right)
        _check_size(_size(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if isinstance(getattr(__obj, "__self__", None), str):  # "…".ljust(10**9)
            _check_widths(args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing widths that are out of all proportion."""

    @wraps(function)  # carries jinja2's marks along
    def narrow(*args: Any, **kwargs: Any) -> Any:
        _check_widths(args, kwargs)
        return function(*args, **kwargs)

    return narrow


def _size(value: object) -> int:
    """How much repeating or adding `value` costs; a whole number grows by its bits."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise jinja2.exceptions.SecurityError(f"it made more than {MAX_CHARS:,} characters")


def _check_widths(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > MAX_WIDTH:
            raise jinja2.exceptions.SecurityError(f"it asked for a width of {value}")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter escapes it for HTML."""
    if isinstance(indent, int):
        _check_widths((indent,), {})
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
