"""A self-contained page that compares evaluated files: KL divergence against bits per weight, tables, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import __version__
from .drawing import Chart, linear, logarithmic
from .drawing import page as html_page
from .errors import OutputError
from .evaluation import Result

_FLOOR = 1e-6  # a divergence of 0 has no logarithm
_STYLE = """
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin-bottom: 1em; }
caption { text-align: left; font-size: 15px; padding: .3em 0; }
td, th { padding: .25em .6em; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, .text td, .text th { text-align: left; }
thead th { vertical-align: bottom; } code { font-size: 12px; }
"""
Cells = Sequence[str]


def write(path: str, results: Sequence[Result]) -> None:
    """Write the page; OutputError if it cannot be written."""
    try:
        Path(path).write_text(page(results), "utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def page(results: Sequence[Result]) -> str:
    """The page as HTML: no scripts, no links, nothing to fetch. Files by bits per weight."""
    results = sorted(results, key=lambda r: r.bits_per_weight)
    first, names = results[0], _names(results)
    against = f", compared with {escape(_short(first.reference))}" if first.reference else ""
    picture = plot(names, results) if any(r.kld_mean is not None for r in results) else ""
    body = f"""<h1>Quality per bit</h1>
<p>{first.texts} texts, {first.tokens:,} predicted tokens{against}. Better is further down and further left.</p>
<div class="wide">{picture}</div>
{_figures(names, results)}
<p>± is one standard error, texts taken as clusters. KL divergence, in nats, is that of the file's next token from the
reference's: its mean, and what 50, 99 and 99.9 % of tokens stay below. Top-1: how often both think the same token
likeliest. Bits per weight: all stored weight bytes × 8 / parameters. Disk: the whole file. Memory: weights and expert
slots as this machine loaded them. 1 MB is 10<sup>6</sup> bytes.</p>
{_routers(names, results)}
{_provenance(names, results)}"""
    return html_page("squizd eval: quality per bit", body, _STYLE)


def plot(names: Sequence[str], results: Sequence[Result]) -> str:
    """SVG that also stands alone: mean KL divergence, on a logarithmic scale, against bits per weight.

    Results without a reference are left out; there must be one that has it.
    """
    measured = [(name, r) for name, r in zip(names, results, strict=True) if r.kld_mean is not None]
    points = [(r.bits_per_weight, max(r.kld_mean or 0.0, _FLOOR), r.kld_mean_error or 0.0, n) for n, r in measured]
    ends = [end for _, kld, error, _ in points for end in (max(kld - error, kld / 4), kld + error)]
    chart = Chart(
        linear([p[0] for p in points]), logarithmic(ends), "KL divergence against bits per weight",
        "; ".join(f"{name}: {kld:.5f} at {bits:.2f} bits" for bits, kld, _, name in points),
        x_title="bits per weight (scales and biases included)", y_title="mean KL divergence, nats (logarithmic)",
        note="bars: ± one standard error",
    )  # fmt: skip
    for bits, kld, error, name in points:
        hover = f"{name}: {kld:.5f} ± {error:.5f} nats at {bits:.3f} bits per weight"
        chart.point(bits, kld, error, name.removesuffix(".squizd"), hover)
    return chart.svg()


def _names(results: Sequence[Result]) -> list[str]:
    """File names, with their folders where two are alike."""
    short = [Path(r.file).name for r in results]
    return [r.file if short.count(name) > 1 else name for name, r in zip(short, results, strict=True)]


def _short(reference: str) -> str:
    """A repository's id, or the last part of a path: where it lies here says nothing to others."""
    return Path(reference).name if Path(reference).exists() else reference


def _table(caption: str, head: Cells, rows: Sequence[Cells], kind: str = "") -> str:
    """HTML of cells that are HTML; the first of each row is its name."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (f'<div class="wide"><table class="{kind}"><caption>{caption}</caption><thead><tr>{columns}</tr></thead>\n'
            f"<tbody>{lines}</tbody></table></div>")  # fmt: skip


def _figures(names: Sequence[str], results: Sequence[Result]) -> str:
    measured = any(r.kld_mean is not None for r in results)
    head = ["file", "bits per<br>weight", "disk,<br>MB", "memory,<br>MB", "perplexity"]
    if measured:
        head += ["KL divergence,<br>mean", "50 %", "99 %", "99.9 %", "largest", "top-1"]
    rows = []
    for name, r in zip(names, results, strict=True):
        cells = [escape(name), f"{r.bits_per_weight:.3f}", f"{r.file_bytes / 1e6:,.1f}", f"{r.memory_bytes / 1e6:,.1f}"]
        cells.append(f"{r.perplexity:,.3f} ± {r.perplexity_error:,.3f}")
        if r.kld_mean is not None:
            cells.append(f"{r.kld_mean:.5f} ± {r.kld_mean_error:.5f}")
            cells += [f"{v:.4f}" for v in (r.kld_median, r.kld_99, r.kld_999, r.kld_max) if v is not None]
            cells.append(f"{r.top1_agreement:.2%} ± {r.top1_agreement_error:.2%}")
        rows.append([*cells, *[""] * (len(head) - len(cells))])
    known = next((r for r in results if r.reference_perplexity is not None), None)
    if known is not None:
        cells = ["the reference", "", "", "", f"{known.reference_perplexity:,.3f}"]
        rows.append([*cells, *[""] * (len(head) - len(cells))])
    return _table("Figures", head, rows)


def _routers(names: Sequence[str], results: Sequence[Result]) -> str:
    paths = list(dict.fromkeys(path for r in results for path in r.router_agreement))
    if not paths:
        return ""
    rows = []
    for path in paths:
        values = [r.router_agreement.get(path) for r in results]
        rows.append([escape(path), *("" if value is None else f"{value:.2%}" for value in values)])
    head = ["layer", *(escape(name.removesuffix(".squizd")) for name in names)]
    return _table("Experts that the reference chose as well, mean share of a token's", head, rows)


def _provenance(names: Sequence[str], results: Sequence[Result]) -> str:
    first = results[0]
    facts = [["text", escape(first.text), _code(first.text_sha256)]]
    if first.reference:
        own = first.reference_id if Path(first.reference).is_file() else ""  # a checkpoint's is this machine's alone
        facts.append(["reference", escape(_short(first.reference)), _code(own)])
    facts += [[escape(name), escape(f"{r.made}, from {r.source}"), _code(r.file_id)]
              for name, r in zip(names, results, strict=True)]  # fmt: skip
    measured = (
        f"Measured by squizd {__version__}, first {first.context} tokens of each text, {escape(first.arithmetic)}."
    )
    return _table("Provenance", ["", "what", "identity"], facts, "text") + f"\n<p>{measured}</p>"


def _code(digest: str) -> str:
    return f"<code>{escape(digest)}</code>"
