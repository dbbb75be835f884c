"""Charts as inline SVG that follow the page's theme: colours are classes and currentColor, never fixed.

A chart is drawn for the width of a telephone, so that its letters stay readable there; the page sets several in a row.
All text goes through markupsafe, as the names of classes come from the user's folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 42
_LETTER = 7.0  # width of a letter of a heat map, about
_LABEL = 18  # letters of a label of a heat map

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Points of a chart; `style` is a class of the page: ours, baseline, other, ideal."""

    name: str
    points: Points
    style: str = "ours"
    joined: bool = True


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
) -> Markup:
    """Lines (with a dot a point, where they are few) or clouds of points over two axes; percent: y is a share."""
    every = [point for one in series for point in one.points]
    x_low, x_high = x_range or _range([x for x, _ in every])
    y_low, y_high = y_range or _range([y for _, y in every])
    if y_range is None:  # whole steps, so that the lines touch no edge
        step = _step(y_low, y_high)
        y_low, y_high = step * math.floor(y_low / step + 1e-9), step * math.ceil(y_high / step - 1e-9)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(y_low, y_high)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * _inner_height(), 1)

    parts = []
    for value in y_ticks:
        _, y = at(x_low, value)
        parts.append(_line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 6, y + 4, f"{100 * value:g}%" if percent else f"{value:g}", "end"))
    for value in x_ticks:
        x, _ = at(value, y_low)
        parts.append(_line("grid", x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{value:,g}", "middle"))
    parts.append(_line("axis", _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM))
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle"))
    parts += [_drawn(one, [at(*point) for point in one.points]) for one in series]
    label = Markup("{} against {}; {}").format(y_label, x_label, ", ".join(one.name for one in series))
    drawing = _svg(_WIDTH, _HEIGHT, label, parts)
    said = Markup(" <span class='unit'>{}</span>").format(y_label) if y_label else Markup("")
    return Markup("<figure class='chart'><figcaption>{}{}</figcaption>{}</figure>").format(title, said, drawing)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    x_label: str = "",
    y_label: str = "",
    tall_labels: bool = True,
    style: str = "",
) -> Markup:
    """A grid of cells: the colour's strength is |share| (0 to 1), its tone the sign; a text a cell, '' for none.

    style: a further class of the page.
    tall_labels: the columns' names stand aslant, for long ones.
    """
    cell = 30
    left = 8 + _LETTER * min(_LABEL, max((len(name) for name in rows), default=0)) + (18 if y_label else 0)
    longest = min(_LABEL, max((len(name) for name in columns), default=0))
    top = (10 + 0.72 * _LETTER * longest if tall_labels else 18) + (16 if x_label else 0)
    lean = 0.72 * _LETTER * longest if tall_labels else 4
    width, height = left + cell * len(columns) + lean, top + cell * len(rows) + 4
    parts = []
    if x_label:
        parts.append(_text(left + cell * len(columns) / 2, 12, x_label, "middle"))
    if y_label:
        y = top + cell * len(rows) / 2
        parts.append(Markup("<text transform='translate(11 {:.1f}) rotate(-90)' text-anchor='middle'>{}</text>").format(
            y, y_label))  # fmt: skip
    for number, name in enumerate(columns):
        x = left + cell * (number + 0.5)
        turn = Markup(" rotate(-45)") if tall_labels else ""
        anchor = "start" if tall_labels else "middle"
        parts.append(
            Markup("<text transform='translate({:.1f} {:.1f}){}' text-anchor='{}'>{}<title>{}</title></text>").format(
                x + (3 if tall_labels else 0), top - 5, turn, anchor, clipped(name), name
            )
        )
    for row, name in enumerate(rows):
        y = top + cell * row
        parts.append(_text(left - 6, y + cell / 2 + 4, clipped(name), "end", name))
        for column, other in enumerate(columns):
            parts.append(_cell(left + cell * column, y, cell, shares[row][column], texts[row][column],
                               f"{name} / {other}"))  # fmt: skip
    drawing = _svg(width, height, title, parts, min_width=0.8 * width)
    return Markup("<figure class='map {}'><figcaption>{}</figcaption><div class='scroll'>{}</div></figure>").format(
        style, title, drawing
    )


def clipped(text: str, length: int = _LABEL) -> str:
    """At most `length` letters, the last of them an ellipsis where something is cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def ticks(low: float, high: float) -> list[float]:
    """The four to seven or so round numbers from low to high."""
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(step * number, digits) for number in range(first, last + 1)]


def _step(low: float, high: float) -> float:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * power - rough))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _inner_height() -> float:
    return _HEIGHT - _TOP - _BOTTOM


def _drawn(series: Series, places: Points) -> Markup:
    if not places:
        return Markup("")
    if not series.joined:  # one path of dots: a stroke of no length with round ends
        dots = "".join(f"M{x:g} {y:g}h0" for x, y in places)
        return Markup("<path class='dots {}' d='{}'/>").format(series.style, dots)
    line = " ".join(f"{x:g},{y:g}" for x, y in places)
    parts = [Markup("<polyline class='{}' points='{}'/>").format(series.style, line)]
    if len(places) <= 20 and series.style != "ideal":
        parts += [
            Markup("<circle class='{}' cx='{:g}' cy='{:g}' r='2.6'><title>{}: {:g}, {:.4g}</title></circle>").format(
                series.style, x, y, series.name, *value
            )
            for (x, y), value in zip(places, series.points, strict=True)
        ]
    return Markup("").join(parts)


def _cell(x: float, y: float, side: float, share: float, text: str, name: str) -> Markup:
    area = Markup("x='{:.1f}' y='{:.1f}' width='{}' height='{}'").format(x + 0.5, y + 0.5, side - 1, side - 1)
    ground = Markup("<rect class='cell empty' {}/>").format(area)
    if not share and not text:
        return ground
    tone, strength = "minus" if share < 0 else "plus", min(1.0, abs(share))
    colour = Markup("<rect class='cell {}' {} fill-opacity='{:.2f}'/>").format(tone, area, strength)
    number = _text(x + side / 2, y + side / 2 + 4, text, "middle", style="strong" if strength > 0.75 else "")
    return Markup("<g><title>{}: {}</title>{}{}{}</g>").format(name, text, ground, colour, number)


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup("<line class='{}' x1='{:g}' y1='{:g}' x2='{:g}' y2='{:g}'/>").format(style, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, title: str = "", style: str = "") -> Markup:
    more = Markup("<title>{}</title>").format(title) if title and title != text else Markup("")
    kind = Markup(" class='{}'").format(style) if style else Markup("")
    return Markup("<text x='{:.1f}' y='{:.1f}' text-anchor='{}'{}>{}{}</text>").format(x, y, anchor, kind, text, more)


def _svg(width: float, height: float, label: str, parts: Sequence[Markup], min_width: float = 0) -> Markup:
    limits = Markup("min-width:{:.0f}px;max-width:{:.0f}px").format(min_width, 1.35 * width)
    size = Markup("viewBox='0 0 {:.0f} {:.0f}' style='{}'").format(width, height, limits)
    return Markup("<svg {} role='img' aria-label='{}'>{}</svg>").format(size, label, Markup("").join(parts))
