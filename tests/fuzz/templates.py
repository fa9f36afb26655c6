"""Chat templates that mean harm, put together at random from what templates are made of."""

from __future__ import annotations

import random

NUMBERS = ("0", "1", "2", "-1", "7", "1000", "99999", "10**6", "10**9", "2**63", "0.5")
NAMES = ("x", "y", "ns.x", "messages", "messages[0]", "messages[0].content", "bos_token", "loop")
HIDDEN = (
    "__class__", "__globals__", "__init__", "__subclasses__()", "__mro__", "_x", "gi_frame",
    "format", "format_map", "mro()", "encode()", "to_bytes(9)", "func_globals", "environment",
)  # fmt: skip
FILTERS = (
    "abs", "batch(N)", "batch(N, E)", "capitalize", "center(N)", "d(E)", "dictsort", "e",
    "filesizeformat", "first", "float", "forceescape", "format(E)", "format(E, E)", "groupby(E)",
    "indent(N)", "indent(E)", "int", "items", "join", "join(E)", "last", "length", "list", "lower",
    "map('F')", "map('center', N)", "map(attribute=E)", "max", "min", "pprint", "random",
    "reject('in', E)", "replace(E, E)", "reverse", "round", "select('in', E)", "selectattr(E)",
    "slice(N)", "slice(N, E)", "sort", "string", "striptags", "sum", "sum(start=E)", "title",
    "tojson", "tojson(indent=N)", "trim", "truncate(N)", "unique", "upper", "urlencode",
    "wordcount", "wordwrap(N)", "wordwrap(N, wrapstring=E)", "xmlattr",
)  # fmt: skip
METHODS = (
    "append(E)", "center(N)", "copy()", "count(E)", "expandtabs(N)", "format(E)", "format(a=E)",
    "fromkeys(E, E)", "get(E)", "items()", "join(E)", "keys()", "ljust(N)", "partition(E)",
    "replace(E, E)", "rjust(N)", "split()", "split(E)", "splitlines()", "startswith(E)", "strip()",
    "title()", "translate(E)", "update(E)", "upper()", "values()", "zfill(N)",
)  # fmt: skip


def template(chance: random.Random) -> str:
    """One of some twenty statements and texts."""
    begin = "{% set ns = namespace(x='x') %}{% set x = 'ab' %}{% set y = [1, 'c'] %}"
    lines = [_statement(chance, 3) for _ in range(chance.choice((1, 3, 8)))]
    return begin + "".join(lines)


def _statement(chance: random.Random, depth: int) -> str:
    body = "".join(_statement(chance, depth - 1) for _ in range(2)) if depth else "z"
    value = _expression(chance, 3)
    forms = (
        f"{{{{ {value} }}}}",
        f"{{% set x = {value} %}}",
        f"{{% set ns.x = {value} %}}",
        "{% set x = [x, x] %}{% set y = {'a': y, 'b': y} %}",
        f"{{% set ns.x = {_grown(chance)} %}}",
        f"{{% set ns.x %}}{{{{ ns.x }}}}{{{{ ns.x }}}}{body}{{% endset %}}",
        f"{{% for i in range({chance.choice(NUMBERS)}) %}}{body}{{% endfor %}}",
        f"{{% for x in y if x in {value} %}}{body}{{% endfor %}}",
        f"{{% for x in y recursive %}}{{{{ loop(y) }}}}{body}{{% endfor %}}",
        f"{{% for x in {value} %}}{body}{{% else %}}{body}{{% endfor %}}",
        f"{{% if {value} %}}{body}{{% elif x %}}{body}{{% endif %}}",
        f"{{% macro m(a, b=2) %}}{body}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m({value}) }}}}",
        "{% macro v() %}{% set ns.x = varargs %}{% endmacro %}{{ v(ns.x, ns.x) }}",
        f"{{% call(x) m() %}}{body}{{% endcall %}}",
        f"{{% filter {_applied(chance, chance.choice(FILTERS), 1)} %}}{body}{{% endfilter %}}",
        f"{{% with x = {value} %}}{body}{{% endwith %}}",
        f"{{% generation %}}{body}{{% endgeneration %}}",
        f"{{% raw %}}{body}{{% endraw %}}",
        f"{{{{ raise_exception({value}) }}}}",
        f"{{% include {value} %}}",
        chance.choice(("{{", "{%", "{#", "{% endfor %}", "{% if", "\0", "{{ ((((", "\ud7ff" * 9)),
    )
    weights = [4] * 6 + [3] * 8 + [1] * (len(forms) - 14)
    return chance.choices(forms, weights)[0]


def _grown(chance: random.Random) -> str:
    return chance.choice(
        (
            "ns.x ~ ns.x",
            "ns.x + ns.x",
            "ns.x * 9",
            "[ns.x, ns.x]",
            "(ns.x, ns.x)",
            "[ns.x] * 99",
            "{0: ns.x, 1: ns.x}",
            "dict(a=ns.x, b=ns.x)",
            "ns.x % (ns.x, ns.x)",
            "'%s%s' % (x, x)",
            "namespace(x=ns.x, y=ns.x)",
            "[ns.x, ns.x]|list",
            "ns.x|string * 2",
            "cycler(ns.x, x)",
        )
    )


def _expression(chance: random.Random, depth: int) -> str:
    if not depth:
        return chance.choice((*NAMES, *NUMBERS, "'%s'", "'{0}{1}'", "'%(a)s'", "'a\\n\\tb'", "[]"))
    left, right = _expression(chance, depth - 1), _expression(chance, depth - 1)
    operator = chance.choice(("+", "-", "*", "/", "//", "%", "**", "~", "in", "==", "and", "<"))
    forms = (
        f"{left}",
        f"({left} {operator} {right})",
        f"({left} {operator} {right})",
        f"({left})|{_applied(chance, chance.choice(FILTERS), depth - 1)}",
        f"({left})|{_applied(chance, chance.choice(FILTERS), depth - 1)}",
        f"({left}).{_applied(chance, chance.choice(METHODS), depth - 1)}",
        f"({left}).{chance.choice(HIDDEN)}",
        f"({left})|attr('{chance.choice(HIDDEN)}')",
        f"({left})[{right}]",
        f"({left})[{right}:]",
        f"[{left}, {right}]",
        f"{{'a': {left}, 'b': {right}}}",
        f"range({left})|list",
        f"({left} if {right} else {left})",
    )
    return chance.choice(forms)


def _applied(chance: random.Random, form: str, depth: int) -> str:
    """A filter or method with values for its letters: N a number, E anything, F a filter's name."""
    made = ""
    for letter in form:
        if letter == "N":
            made += chance.choice(NUMBERS)
        elif letter == "E":
            made += _expression(chance, max(depth, 0))
        elif letter == "F":
            made += chance.choice(FILTERS).partition("(")[0]
        else:
            made += letter
    return made
