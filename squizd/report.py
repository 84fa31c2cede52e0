"""A self-contained page that compares evaluated files: log KL divergence against bits per weight, and a table."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from .errors import OutputError
from .evaluation import Result

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 440, 70, 150, 20, 50
_FLOOR = 1e-6  # a divergence of 0 has no logarithm
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
svg { width: 100%; max-width: 900px; height: auto; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .25em .7em; border-bottom: 1px solid #ddd;
text-align: right; } td:first-child, th:first-child { text-align: left; }
"""
_PLOT_STYLE = (
    "text { font: 12px system-ui, sans-serif; fill: #444; } .grid { stroke: #ddd; } .bar { stroke: #1565c0; } "
    ".dot { fill: #1565c0; }"
)


def write(path: str, results: Sequence[Result]) -> None:
    """Write the page; OutputError if it cannot be written."""
    try:
        Path(path).write_text(page(results), "utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def page(results: Sequence[Result]) -> str:
    """The page as HTML: no scripts, no links, nothing to fetch."""
    first = results[0]
    names = _names(results)
    measured = any(r.kld_mean is not None for r in results)
    reference = f"against {html.escape(first.reference)}" if first.reference else "without a reference"
    picture = plot(names, results) if measured else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>squizd eval</title><style>{_STYLE}</style></head><body>
<h1>Quality per bit</h1>
<p>{first.texts} texts, {first.tokens:,} predicted tokens, {reference}. KL divergence in nats; ± is one standard error,
texts taken as clusters. Bits per weight: all stored weight bytes × 8 / parameters. Disk: the whole file.
Memory: weights and expert slots as this machine loads them.</p>
{picture}
{_table(names, results)}
{_routers(names, results)}
</body></html>
"""


def _names(results: Sequence[Result]) -> list[str]:
    """File names, with their folders where two are alike."""
    short = [Path(r.file).name for r in results]
    return [r.file if short.count(name) > 1 else name for name, r in zip(short, results, strict=True)]


def plot(names: Sequence[str], results: Sequence[Result]) -> str:
    """SVG that also stands alone: mean KL divergence, on a logarithmic scale, against bits per weight.

    Results without a reference are left out; there must be one that has it.
    """
    measured = [(name, r) for name, r in zip(names, results, strict=True) if r.kld_mean is not None]
    points = [(r.bits_per_weight, max(r.kld_mean or 0.0, _FLOOR), r.kld_mean_error or 0.0, n) for n, r in measured]
    low_x, high_x = math.floor(min(p[0] for p in points)), math.ceil(max(p[0] for p in points) + 1e-9)
    low_y = math.floor(math.log10(min(p[1] for p in points)))
    high_y = max(math.ceil(math.log10(max(p[1] for p in points))), low_y + 1)

    def x(bits: float) -> float:
        return _LEFT + (bits - low_x) / max(high_x - low_x, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(kld: float) -> float:
        share = (math.log10(max(kld, 10.0**low_y)) - low_y) / (high_y - low_y)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
             f'aria-label="KL divergence against bits per weight"><style>{_PLOT_STYLE}</style>']  # fmt: skip
    for power in range(low_y, high_y + 1):
        at = y(10.0**power)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for whole in range(low_x, high_x + 1):
        at = x(whole)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        lines.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{whole}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    lines.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">bits per weight</text>'
    )
    lines.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">mean KL divergence</text>')
    for bits, kld, error, name in points:
        lines.append(f'<line class="bar" x1="{x(bits):.1f}" x2="{x(bits):.1f}" y1="{y(kld + error):.1f}" '
                     f'y2="{y(kld - error):.1f}"/>')  # fmt: skip
        lines.append(f'<circle class="dot" cx="{x(bits):.1f}" cy="{y(kld):.1f}" r="4"/>')
        lines.append(f'<text x="{x(bits) + 8:.1f}" y="{y(kld) - 6:.1f}">{html.escape(name)}</text>')
    return "\n".join([*lines, "</svg>"])


_COLUMNS = ("file", "bits per weight", "perplexity", "KLD mean", "median", "99 %", "99.9 %", "max", "top-1",
            "disk, MB", "memory, MB")  # fmt: skip


def _table(names: Sequence[str], results: Sequence[Result]) -> str:
    rows = []
    for name, r in zip(names, results, strict=True):
        cells = [html.escape(name), f"{r.bits_per_weight:.3f}", f"{r.perplexity:.3f} ± {r.perplexity_error:.3f}"]
        if r.kld_mean is not None:
            cells.append(f"{r.kld_mean:.5f} ± {r.kld_mean_error:.5f}")
            cells += [f"{v:.4f}" for v in (r.kld_median, r.kld_99, r.kld_999, r.kld_max) if v is not None]
            cells.append(f"{r.top1_agreement:.2%}")
        cells += [""] * (len(_COLUMNS) - 2 - len(cells))
        cells += [f"{size / 1e6:,.1f}" for size in (r.file_bytes, r.memory_bytes)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    return f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"


def _routers(names: Sequence[str], results: Sequence[Result]) -> str:
    paths = list(dict.fromkeys(path for r in results for path in r.router_agreement))
    if not paths:
        return ""
    head = "<th>layer</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for path in paths:
        values = (r.router_agreement.get(path) for r in results)
        cells = "".join(f"<td>{'' if value is None else f'{value:.2%}'}</td>" for value in values)
        rows.append(f"<tr><td>{html.escape(path)}</td>{cells}</tr>")
    return f"<h2>Experts that the reference chose as well</h2>\n<table><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"
