"""A `fitting.Fit` as a picture: one SVG without references to anything, alone or inside a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .fitting import Fit

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 720, 420, 70, 50, 570, 300
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def draw(fit: Fit, html: bool = False) -> str:
    """Memory against hit rate, and against tokens a second where they were measured."""
    rows = sorted(fit.rows, key=lambda row: row.memory)
    speeds = [("tokens/s, cold disk", [r.tokens_per_second_cold for r in rows]),
              ("tokens/s, from cache", [r.tokens_per_second_warm for r in rows])]  # fmt: skip
    known = [(name, [v for v in values if v is not None]) for name, values in speeds]
    known = [(name, values) for name, values in known if len(values) == len(rows)]
    fastest = max((v for _, values in known for v in values), default=1.0)
    xs = [_x(r.memory, rows[0].memory, rows[-1].memory) for r in rows]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(fit.path)}</text>',
        f'<text x="{_LEFT}" y="38" fill="#555">{escape(fit.explanation)}</text>',
    ]
    for i in range(5):
        y = _TOP + _PLOT_HEIGHT - i * _PLOT_HEIGHT / 4
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{_PLOT_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{25 * i} %</text>')
        if known:
            parts.append(f'<text x="{_LEFT + _PLOT_WIDTH + 8}" y="{y + 4:.1f}">{fastest * i / 4:.3g}</text>')
    for x, row in zip(xs, rows, strict=True):
        label = f"{row.memory / 1e9:.3g} GB" if row.memory >= 10**9 else f"{row.memory / 1e6:.3g} MB"
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _PLOT_HEIGHT + 18}" text-anchor="middle">{label}</text>')
    lines = [("hit rate", [r.hit_rate for r in rows], 1.0), *((name, values, fastest) for name, values in known)]
    for i, (name, values, top) in enumerate(lines):
        points = " ".join(f"{x:.1f},{_TOP + _PLOT_HEIGHT * (1 - v / top):.1f}" for x, v in zip(xs, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_COLOURS[i]}" stroke-width="2"/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{_COLOURS[i]}"/>'
                  for p in points.split()]  # fmt: skip
        parts.append(f'<text x="{_LEFT + 160 * i}" y="{_HEIGHT - 14}" fill="{_COLOURS[i]}">{name}</text>')
    svg = "\n".join([*parts, "</svg>"]) + "\n"
    page = '<!doctype html>\n<meta charset="utf-8">\n<title>squizd fit</title>\n'
    return page + svg if html else svg


def _x(memory: int, least: int, most: int) -> float:
    return _LEFT + (_PLOT_WIDTH * (memory - least) / (most - least) if most > least else _PLOT_WIDTH / 2)


def table(fit: Fit, size: Sequence[str] = ("B", "kB", "MB", "GB")) -> list[str]:
    """The rows as lines of text under a line of names."""
    lines = ["    memory  experts  hit rate  read/token  tokens/s cold  from cache"]
    for r in fit.rows:
        speeds = [f"{v:.1f}" if v is not None else "-" for v in (r.tokens_per_second_cold, r.tokens_per_second_warm)]
        lines.append(
            f"{_size(r.memory, size):>10} {r.resident_share:>8.0%} {r.hit_rate:>9.1%} "
            f"{_size(r.bytes_per_token, size):>11} {speeds[0]:>14} {speeds[1]:>11}"
        )
    return lines


def _size(count: float, units: Sequence[str]) -> str:
    index = 0
    while count >= 1000 and index < len(units) - 1:
        count, index = count / 1000, index + 1
    return f"{count:.0f} {units[index]}" if index == 0 else f"{count:.1f} {units[index]}"
