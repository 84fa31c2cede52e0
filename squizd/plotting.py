"""A `fitting.Fit` as a picture, alone or inside a page of HTML, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .drawing import Chart, linear, page
from .fitting import Fit


def draw(fit: Fit, html: bool = False) -> str:
    """Memory against hit rate, and against tokens a second where they were measured."""
    rows = sorted(fit.rows, key=lambda row: row.memory)
    known = [
        (name, [(r.memory, v) for r, v in zip(rows, values, strict=True) if v is not None])
        for name, values in (
            ("tokens/s, cold disk", [r.tokens_per_second_cold for r in rows]),
            ("tokens/s, from cache", [r.tokens_per_second_warm for r in rows]),
        )
    ]
    known = [(name, points) for name, points in known if points]
    unit, size = ("GB", 1e9) if rows[-1].memory >= 10**9 else ("MB", 1e6)
    speeds = [v for _, points in known for _, v in points]
    chart = Chart(
        linear([r.memory for r in rows], lambda memory: f"{memory / size:g}"),
        linear([0.0, 1.0], "{:.0%}".format),
        f"{Path(fit.path).name}: what memory buys",
        "; ".join(f"{r.memory / size:.3g} {unit}: hit rate {r.hit_rate:.1%}" for r in rows),
        x_title=f"memory, {unit}",
        y_title="hit rate: experts found in memory",
        note=fit.explanation,
        right=linear(speeds, zero=True) if speeds else None,
        right_title="tokens a second" if speeds else "",
    )
    chart.line([(r.memory, r.hit_rate) for r in rows], "hit rate (left)", 0)
    for series, (name, points) in enumerate(known, 1):
        chart.line(points, f"{name} (right)", series, right=True)
    return page("squizd fit", f'<div class="wide">{chart.svg()}</div>') if html else chart.svg() + "\n"


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
