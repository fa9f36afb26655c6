"""Runs a model's chat template, which is somebody else's program.

It runs in jinja2's sandbox, sees plain JSON data only, and whatever it does wrong comes out as a
one-line PotexportError. What a prompt is used for is `text.py`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
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
from potexport.runtime import metering

Message = Mapping[str, object]
Body = TypeVar("Body", nodes.For, nodes.Macro)


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
    begun = metering.begin()
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**given):
            pieces.append(piece)
            size += len(piece)
            metering.check_size(size)
    except jinja2.exceptions.SecurityError as error:
        raise PotexportError(f"the chat template is not safe to run: {one_line(error)}") from error
    except jinja2.TemplateError as error:  # also what the template raises on purpose
        raise PotexportError(f"the chat template refused: {one_line(error)}") from error
    except Exception as error:  # a template is a program; it may raise whatever Python raises
        raise PotexportError(
            f"the chat template failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        metering.end(begun)
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
    """Puts the clock into loops and macros, and a limit on what jinja2 cannot intercept: `~`,
    slices, and lists and dicts that are written out."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        if node.test is not None:  # it runs for each item that is left out, too
            node.test = nodes.And(nodes.Not(_asked("tick")), node.test)
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("bounded_join", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("made", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("made", node) if isinstance(node.arg, nodes.Slice) else node

    def _ticking(self, node: Body) -> Body:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_asked("tick"), lineno=node.lineno))
        return node


def _asked(method: str, *given: nodes.Expr) -> nodes.Call:
    """A call of a method of the sandbox, in a template."""
    asked = nodes.Call(nodes.EnvironmentAttribute(method), list(given), [], None, None)
    asked.set_lineno(given[0].lineno if given else 1)
    return asked


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
    """jinja2's sandbox, set up as transformers does, where every value that is made is counted.

    No loader, so nothing is included or imported.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run filters outside the clock
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _tojson
        del self.filters["urlize"]  # takes the square of a text's length
        self.filters = {name: _counted(name, each) for name, each in self.filters.items()}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _timed(each) for name, each in tests.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _dict  # not the class, which has attributes
        del self.globals["lipsum"]  # text of any length
        # jinja2 joins with it what macros and blocks print.
        self.concat = self.bounded_concat  # type: ignore[method-assign]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Bytes are none of a template's business, and would be counted by nobody.
        return attr not in ("encode", "to_bytes") and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        fill = super().wrap_str_format(value)
        if fill is None:
            return None
        form = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            metering.check_fields(form)
            mapping = args[0] if args and isinstance(args[0], Mapping) else {}
            metering.check_format(form, [*args, *kwargs.values(), *mapping.values()])
            return fill(*args, **kwargs)

        return bounded

    def tick(self) -> str:
        metering.tick()
        return ""

    def made(self, value: Any) -> Any:
        return metering.made(value)

    def bounded_join(self, *parts: object) -> str:
        return self.bounded_concat([_printed(part) for part in parts])

    def bounded_concat(self, parts: Iterable[str]) -> str:
        texts, size = [], 0
        for text in parts:
            texts.append(text)
            size += len(text)
            metering.check_size(size)
        return str(metering.made("".join(texts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    metering.check_size(metering.weight(many) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            metering.check_size(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            metering.check_format(left, right)
        return metering.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)  # without what jinja2 tells of the loop it stands in
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):  # "…".ljust(10**9)
            metering.check_method(text, __obj.__name__, args, kwargs)
        metering.weight([args, kwargs])  # a macro may keep them
        return metering.made(super().call(__context, __obj, *args, **kwargs))


def _printed(value: object) -> str:
    metering.weight(value)
    return str(value)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, refused where it would make too much; what it made is counted."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # carries jinja2's marks along
    def counted(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[skipped:]
        metering.check_filter(name, value, tuple(rest), kwargs)
        return metering.made(function(*args, **kwargs))

    return counted


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test, which may be asked of every part of a list in one operation."""

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        metering.tick()
        return function(*args, **kwargs)

    return timed


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
        metering.check_size(metering.weight(value) * indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    metering.check_date(pattern)
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
