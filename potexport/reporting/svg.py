"""SVG elements as escaped markup, and the scales of a drawing. Colours are classes: the page's
style knows light and dark."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

Value = str | int | float


def tag(element: str, *children: str, **attributes: Value) -> Markup:
    """One element; `class_` is class, `text_anchor` is text-anchor, numbers get two decimals."""
    named = (
        Markup(' {}="{}"').format(_name(name), _short(value)) for name, value in attributes.items()
    )
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(element), Markup("").join(named), inner)


def _name(name: str) -> Markup:
    name = name.rstrip("_")
    return Markup(name if name == "viewBox" else name.replace("_", "-"))


def _short(value: Value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def picture(
    wide: float, tall: float, label: str, *children: str, class_: str, **attributes: Value
) -> Markup:
    """An SVG of this size, unless the page scales it, that a screen reader calls `label`."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {_short(float(wide))} {_short(float(tall))}",
        role="img",
        aria_label=label,
        class_=class_,
        **attributes,
    )


def ticks(high: float, about: int = 4) -> list[float]:
    """Round numbers from 0 to just above `high`, some `about` steps of 1, 2, 2.5 or 5."""
    raw = max(high, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """From values to places, linear."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.0
        return self.first + share * (self.last - self.first)
