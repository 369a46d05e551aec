"""The report's charts, as inline SVG.

Built as element trees, so that every label is escaped; colours are CSS classes of the report's style sheet, so that the
same chart serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH = 720.0


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of a dot-and-interval chart; all values are fractions."""

    label: str
    css: str
    value: float
    low: float | None
    high: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart, or one part of a stacked bar."""

    label: str
    css: str
    value: float
    note: str


class _Svg:
    """An SVG picture in the making; coordinates are CSS pixels at the picture's natural width."""

    def __init__(self, width: float, height: float, title: str) -> None:
        attributes = {"viewBox": f"0 0 {_n(width)} {_n(height)}", "role": "img", "class": "chart"}
        self.root = ElementTree.Element("svg", attributes)
        ElementTree.SubElement(self.root, "title").text = title

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        values = {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": css}
        ElementTree.SubElement(self.root, "line", values)

    def rect(self, x: float, y: float, width: float, height: float, css: str, tip: str = "") -> None:
        values = {"x": _n(x), "y": _n(y), "width": _n(max(width, 0.0)), "height": _n(height), "class": css}
        self._tip(ElementTree.SubElement(self.root, "rect", values), tip)

    def dot(self, x: float, y: float, radius: float, css: str, tip: str = "") -> None:
        values = {"cx": _n(x), "cy": _n(y), "r": _n(radius), "class": css}
        self._tip(ElementTree.SubElement(self.root, "circle", values), tip)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        text = " ".join(f"{'M' if i == 0 else 'L'}{_n(x)} {_n(y)}" for i, (x, y) in enumerate(points))
        ElementTree.SubElement(self.root, "path", {"d": text, "class": css})

    def text(self, x: float, y: float, value: str, css: str = "", anchor: str = "start") -> None:
        values = {"x": _n(x), "y": _n(y), "text-anchor": anchor, "class": css}
        ElementTree.SubElement(self.root, "text", values).text = value

    def _tip(self, element: ElementTree.Element, tip: str) -> None:
        if tip:
            ElementTree.SubElement(element, "title").text = tip

    def done(self) -> Markup:
        # The tree's serializer has escaped every label and attribute.
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as text, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def intervals(rows: Sequence[Interval], title: str) -> Markup:
    """Dots with their confidence intervals on an axis from 0 to 100 %, one row each."""
    left, right, top, pitch = 70.0, 132.0, 8.0, 40.0
    bottom = top + pitch * len(rows)
    svg = _Svg(WIDTH, bottom + 26, title)
    span = WIDTH - left - right

    def x(fraction: float) -> float:
        return left + span * min(max(fraction, 0.0), 1.0)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        svg.line(x(tick), top, x(tick), bottom, "grid")
        svg.text(x(tick), bottom + 18, percent(tick, 0), "tick", "middle")
    for i, row in enumerate(rows):
        y = top + pitch * (i + 0.5)
        svg.text(left - 14, y + 5, row.label, "label", "end")
        if row.low is not None and row.high is not None:
            svg.line(x(row.low), y, x(row.high), y, f"interval {row.css}")
            for end in (row.low, row.high):
                svg.line(x(end), y - 6, x(end), y + 6, f"cap {row.css}")
        svg.dot(x(row.value), y, 6, f"fill {row.css}", row.note)
        svg.text(WIDTH - right + 16, y - 1, percent(row.value), "value")
        svg.text(WIDTH - right + 16, y + 14, row.note, "tick")
    return svg.done()


def bars(rows: Sequence[Bar], title: str) -> Markup:
    """Horizontal bars from zero, one row each, with their notes at the end."""
    left, right, pitch, thick = 150.0, 96.0, 26.0, 14.0
    svg = _Svg(WIDTH, pitch * len(rows) + 4, title)
    longest = max((row.value for row in rows), default=0.0) or 1.0
    for i, row in enumerate(rows):
        y = pitch * i + 2
        width = (WIDTH - left - right) * row.value / longest
        svg.text(left - 12, y + 15, row.label, "label small", "end")
        svg.rect(left, y + (pitch - thick) / 2 - 2, max(width, 1.0), thick, f"fill {row.css}", row.note)
        svg.text(left + width + 8, y + 15, row.note, "tick")
    return svg.done()


def stacked(parts: Sequence[Bar], title: str) -> Markup:
    """One bar of parts, each with its name, note and share below; parts of zero keep their text."""
    svg = _Svg(WIDTH, 84, title)
    total = sum(part.value for part in parts) or 1.0
    x = 0.0
    column = WIDTH / max(len(parts), 1)
    for i, part in enumerate(parts):
        width = WIDTH * part.value / total
        svg.rect(x, 2, width - (2 if width > 4 else 0), 26, f"fill {part.css}", f"{part.label}: {part.note}")
        x += width
        svg.rect(column * i, 45, 10, 10, f"fill {part.css}")
        svg.text(column * i + 17, 54.5, part.label, "label small")
        svg.text(column * i + 17, 73, f"{part.note} · {percent(part.value / total)}", "tick")
    return svg.done()


def curve(
    points: Sequence[tuple[float, float]],
    title: str,
    css: str,
    *,
    fractions: bool = False,
    band: tuple[float, float] | None = None,
) -> Markup | None:
    """One line over training steps.

    Args:
        points: ``(step, value)``; values that are not finite are left out.
        title: what the picture shows, for screen readers.
        css: the class of the line.
        fractions: the values are fractions, shown on an axis from 0 to 100 %.
        band: a range of values to mark, such as the one in which training stops.

    Returns:
        The chart, or None where there are fewer than two points.
    """
    points = [(s, v) for s, v in points if math.isfinite(s) and math.isfinite(v)]
    if len(points) < 2:
        return None
    width, height, left, top, bottom = 350.0, 200.0, 44.0, 10.0, 26.0
    svg = _Svg(width, height, title)
    first, last = points[0][0], points[-1][0]
    values = [v for _, v in points]
    low, high = (0.0, 1.0) if fractions else _round_out(min(values), max(values))

    def x(step: float) -> float:
        return left + (width - left - 10) * (step - first) / ((last - first) or 1.0)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / ((high - low) or 1.0))

    if band is not None:
        svg.rect(left, y(band[1]), width - left - 10, y(band[0]) - y(band[1]), "band")
    for i in range(5):
        value = low + (high - low) * i / 4
        svg.line(left, y(value), width - 10, y(value), "grid")
        svg.text(left - 8, y(value) + 4, percent(value, 0) if fractions else f"{value:.3g}", "tick", "end")
    for step, anchor in ((first, "start"), (last, "end")):
        svg.text(x(step), height - 8, f"{step:g}", "tick", anchor)
    svg.text((left + width - 10) / 2, height - 8, "step", "tick", "middle")
    svg.path([(x(s), y(v)) for s, v in points], f"curve {css}")
    svg.dot(x(last), y(points[-1][1]), 3.5, f"fill {css}", f"step {last:g}: {points[-1][1]:.4g}")
    return svg.done()


def _round_out(low: float, high: float) -> tuple[float, float]:
    """A range around the data whose ends are round numbers."""
    if high - low < 1e-12:
        return low - 0.5, high + 0.5
    unit = 10 ** math.floor(math.log10(high - low))
    step = next(unit * f for f in (0.25, 0.5, 1, 2, 2.5) if (high - low) / (unit * f) <= 6)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def series(history: object, *names: str) -> list[tuple[float, float]]:
    """``(step, value)`` of the first of the names that a history holds; rows without it are left out.

    Args:
        history: a list of ``{"step": …, NAME: …}`` as the training steps report it; anything else gives no points.
        names: candidates, best first.
    """
    rows = [row for row in history if isinstance(row, Mapping)] if isinstance(history, list) else []
    for name in names:
        found = [(row.get("step"), row.get(name)) for row in rows]
        points = [(float(s), float(v)) for s, v in found if isinstance(s, int | float) and isinstance(v, int | float)]
        if points:
            return points
    return []
