"""Charts as SVG: axes, points with errors, lines, labels that keep out of each other's way.

Every picture stands alone or inside a page of HTML: its styles are in it, it refers to nothing, and it follows the
reader's choice of light or dark. Knows nothing of what is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 480
_LEFT, _RIGHT, _BOTTOM = 72, 72, 78
_CHARACTER, _LINE = 6.6, 15.0  # of 12 px text, about
_STYLE = """
.chart { --ground: #fff; --ink: #333; --grid: #e2e2e2; --a: #1565c0; --b: #b3410b; --c: #2e7d32; }
@media (prefers-color-scheme: dark) {
.chart { --ground: #16181b; --ink: #d6d6d6; --grid: #363a40; --a: #7fb8f5; --b: #f0a35e; --c: #84cf88; } }
.chart .ground { fill: var(--ground); } .chart .grid { stroke: var(--grid); } .chart .minor { stroke-opacity: .5; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--ink); } .chart .title { font-size: 15px; font-weight: 600; }
.chart .leader { stroke: var(--ink); stroke-opacity: .4; } .chart .line { fill: none; stroke-width: 2; }
""" + "".join(f".chart .{c} {{ stroke: var(--{c}); }} .chart .{c}.full {{ fill: var(--{c}); }} " for c in "abc")
COLOURS = ("a", "b", "c")
_DASHES = ("none", "7 4", "2 3")  # lines differ without their colours too


@dataclass(frozen=True)
class Scale:
    """Values along an axis: `labels` where lines with text are, `minor` where there are lines without."""

    low: float
    high: float
    labels: dict[float, str]
    minor: tuple[float, ...] = ()
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies beyond them is cut off."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def linear(values: Sequence[float], show: Callable[[float], str] = "{:g}".format, zero: bool = False) -> Scale:
    """A scale with 4 to 9 round values that holds all `values`, and 0 if so asked."""
    low, high = min([*values, 0.0] if zero else values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last += last == first
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], {tick: show(tick) for tick in ticks})


def logarithmic(values: Sequence[float]) -> Scale:
    """A scale from 1, 2 or 5 times a power of ten to another, which holds all `values`; they are positive.

    Tens have labels, and between few tens 2 and 5 as well.
    """
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    ends = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    low = max(end for end in ends if end <= min(values) * (1 + 1e-9))
    high = min(end for end in ends if end >= max(values) * (1 - 1e-9) and end > low)
    few = high / low < 300
    labels = {m * 10.0**p: f"{m * 10.0**p:g}" for p in powers for m in ((1, 2, 5) if few else (1,))}
    labels = {value: text for value, text in labels.items() if low <= value <= high}
    minor = (m * 10.0**power for power in powers for m in range(2, 10))
    return Scale(low, high, labels, tuple(m for m in minor if low < m < high and m not in labels), True)


class Chart:
    """One picture of `x` against `y`, and perhaps a second `y` on the right side; add to it, then take `svg`.

    `title` and `description` are read to those who cannot see; the former, and `note` below it, are shown.
    """

    def __init__(
        self, x: Scale, y: Scale, title: str, description: str, *, x_title: str, y_title: str, note: str = "",
        right: Scale | None = None, right_title: str = "",
    ) -> None:  # fmt: skip
        self._x, self._y, self._right, self._title, self._description = x, y, right, title, description
        lines = textwrap.wrap(note, int((WIDTH - _LEFT - 16) / _CHARACTER))
        self._top = 40 + _LINE * len(lines)
        self._parts = [f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>']
        self._text(_LEFT, 24, title, kind="title")
        for i, line in enumerate(lines):
            self._text(_LEFT, 26 + _LINE * (i + 1), line)
        self._boxes: list[tuple[float, float, float, float]] = []  # left, top, right, bottom of what is to be seen
        self._names: list[tuple[float, float, str]] = []
        end, ground = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        for value in (*y.minor, *y.labels):
            self._grid(_LEFT, self.v(value), end, self.v(value), value in y.labels)
        for value, text in y.labels.items():
            self._text(_LEFT - 8, self.v(value) + 4, text, "end")
        for value, text in (right.labels if right else {}).items():
            self._text(end + 8, self.v(value, True) + 4, text)
        for value, text in x.labels.items():
            self._grid(self.h(value), self._top, self.h(value), ground, True)
            self._text(self.h(value), ground + 18, text, "middle")
        self._text((_LEFT + end) / 2, ground + 38, x_title, "middle")
        for at, turn, text in ((16, -90, y_title), (WIDTH - 12, 90, right_title)):
            place = f"translate({at} {(self._top + ground) / 2:.1f}) rotate({turn})"
            self._parts.append(f'<text transform="{place}" text-anchor="middle">{escape(text)}</text>')

    def h(self, value: float) -> float:
        """Where a value is from left to right."""
        return _LEFT + self._x.share(value) * (WIDTH - _LEFT - _RIGHT)

    def v(self, value: float, right: bool = False) -> float:
        """Where a value of one of the vertical axes is from top to bottom."""
        scale = self._right if right and self._right else self._y
        return HEIGHT - _BOTTOM - scale.share(value) * (HEIGHT - _BOTTOM - self._top)

    def point(self, x: float, y: float, error: float, name: str, hover: str) -> None:
        """A dot with its error either way and its name beside it; `hover` is shown to a mouse."""
        h, v, ends = self.h(x), self.v(y), (self.v(y + error), self.v(y - error))
        bar = f"M{h:.1f} {ends[0]:.1f}V{ends[1]:.1f}" + "".join(f"M{h - 4:.1f} {end:.1f}h8" for end in ends)
        self._parts.append(f'<g><title>{escape(hover)}</title><path class="a" d="{bar}"/>'
                           f'<circle class="a full" cx="{h:.1f}" cy="{v:.1f}" r="4"/></g>')  # fmt: skip
        self._boxes.append((h - 6, min(*ends, v - 6), h + 6, max(*ends, v + 6)))
        self._names.append((h, v, name))

    def line(self, points: Sequence[tuple[float, float]], name: str, series: int, right: bool = False) -> None:
        """Dots joined by a line; `series` chooses how it looks. Its name goes below the picture."""
        places = [(self.h(x), self.v(y, right)) for x, y in points]
        look, dash = COLOURS[series], _DASHES[series]
        joined = " ".join(f"{h:.1f},{v:.1f}" for h, v in places)
        self._parts.append(f'<polyline class="line {look}" stroke-dasharray="{dash}" points="{joined}"/>')
        self._parts += [f'<circle class="{look} full" cx="{h:.1f}" cy="{v:.1f}" r="3"/>' for h, v in places]
        at, key = _LEFT + 210 * series, HEIGHT - 12
        self._parts.append(f'<path class="line {look}" stroke-dasharray="{dash}" d="M{at} {key - 4}h26"/>')
        self._text(at + 32, key, name)

    def svg(self) -> str:
        """The picture."""
        for h, v, name in self._names:
            self._place(h, v, name)
        self._names.clear()
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{escape(self._title)}</title><desc>{escape(self._description)}</desc><style>{_STYLE}</style>",
            *self._parts, "</svg>",
        ])  # fmt: skip

    def _place(self, h: float, v: float, name: str) -> None:
        """Text right or left of (h, v), or further up or down with a line to it, where nothing else is."""
        width, end = _CHARACTER * len(name), HEIGHT - _BOTTOM
        steps = sorted(range(-HEIGHT, HEIGHT, 5), key=lambda step: (abs(step), step))
        boxes = [
            (h + side, v - 10 + step, h + side + width, v + 5 + step) for step in steps for side in (10, -10 - width)
        ]
        inside = [b for b in boxes if b[0] >= _LEFT and b[2] <= WIDTH and b[1] >= self._top - 8 and b[3] <= end]
        free = [b for b in inside if not any(_overlap(b, other) for other in self._boxes)]
        box = next(iter(free or inside or boxes))
        self._boxes.append(box)
        middle, near = (box[1] + box[3]) / 2 + 1, box[0] - 3 if box[0] > h else box[2] + 3
        if abs(middle - v) > 10:
            self._parts.append(f'<path class="leader" d="M{h:.1f} {v:.1f}L{near:.1f} {middle:.1f}"/>')
        self._text(box[0], box[3] - 3, name)

    def _grid(self, x1: float, y1: float, x2: float, y2: float, major: bool) -> None:
        kind = "grid" if major else "grid minor"
        self._parts.append(f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')

    def _text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        more = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text{more} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def page(title: str, body: str, style: str = "") -> str:
    """HTML around it: no scripts, no links, nothing to fetch."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222;
background: #fff; }}
.wide {{ overflow-x: auto; }}
.chart {{ width: 100%; min-width: 640px; max-width: 900px; height: auto; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #16181b; }} }}
{style}</style></head><body>
{body}
</body></html>
"""
