"""`squizd profile`, `fit`, `bench`, `eval`: what a file does with text, and on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from .shared import bar, need_mlx, size

if TYPE_CHECKING:
    from ..evaluation import Result


@click.command()
@click.argument("file", type=click.Path())
@click.option("--text", required=True, type=click.Path(exists=True), help="Text, .jsonl rows of text, or a folder.")
@click.option("--tokens", default=8192, show_default=True, type=click.IntRange(min=1), help="Use so many at most.")
@click.option("-o", "--output", type=click.Path(), help="The file to write.  [default: FILE itself]")
@click.option("--memory", metavar="SIZE", help="Budget while the text runs, as 6GB.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def profile(file: str, text: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Record which experts a text uses, and store that in FILE: it starts warm, and its layers get slots by need.

    Example: squizd profile qwen3.squizd --text notes/
    """
    need_mlx()
    from ..profiling import profile as run_profile

    with bar("profile", "token") as progress:
        s = run_profile(file, text, output, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(asdict(s)))
        return
    rates = ", ".join(f"{rate:.1%} with {share} resident" for share, rate in s.hit_rate.items())
    click.echo(f"{s.path}: {s.tokens} tokens of {s.texts} texts through {s.layers} expert layers; hit rate {rates}")
    if s.unobserved:
        click.echo(f"gate weights of {s.unobserved} layers cannot be observed: stored as equal shares", err=True)


@click.command()
@click.argument("file", type=click.Path())
@click.option("--memory", multiple=True, metavar="SIZE", help="A budget, as 6GB; repeat it.  [default: 100 % to least]")
@click.option("--context", type=click.IntRange(min=2), help="Tokens to reserve cache for.  [default: 4096]")
@click.option("--measure/--no-measure", default=True, help="Time the disk and some tokens.  [default: measure]")
@click.option("--plot", type=click.Path(), metavar="OUT", help="Draw the table as OUT.svg or OUT.html.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def fit(
    file: str, memory: tuple[str, ...], context: int | None, measure: bool, plot: str | None, as_json: bool
) -> None:
    """Predict for FILE on this machine: budget against hit rate, bytes read per token, tokens a second.

    Example: squizd fit qwen3.squizd --memory 4GB --memory 8GB --plot fit.svg
    """
    need_mlx()
    from ..fitting import fit as run_fit
    from ..plotting import draw, table

    if plot is not None and not plot.lower().endswith((".svg", ".html")):
        raise RequestError(f"{plot} is no name for a plot", hint="end it in .svg or .html")
    found = run_fit(file, memory=memory, context=context, measure=measure)
    if plot is not None:
        with open(plot, "w", encoding="utf-8") as picture:
            picture.write(draw(found, html=plot.lower().endswith(".html")))
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    click.echo("\n".join(table(found)))
    click.echo(found.explanation, err=True)
    if found.compute_seconds is not None and found.bytes_per_second_warm is not None:
        rates = [r for r in (found.bytes_per_second_cold, found.bytes_per_second_warm) if r is not None]
        speeds = " cold, ".join(f"{size(rate)}/s" for rate in rates)
        click.echo(
            f"measured: {found.compute_seconds * 1e3:.2f} ms a token without reading; experts at {speeds} from cache",
            err=True,
        )


@click.command()
@click.argument("file", type=click.Path())
@click.option("-p", "--prompt", help="What every trial begins with.  [default: a sentence]")
@click.option("-n", "--tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens of each trial.")
@click.option(
    "--trials", default=30, show_default=True, type=click.IntRange(min=1), help="After one that is not counted."
)
@click.option("--memory", "--budget", metavar="SIZE", help="Budget for weights, cache and work space, as 6GB.")
@click.option("--resident", metavar="SHARE", help="Share of the experts to keep in memory, as 25%.")
@click.option("--against", multiple=True, type=click.Choice(["mlx-lm", "mlx-lm-f32", "llama.cpp"]),
              help="Take turns with mlx-lm on the same weights, in the file's number types or in float32, or with "
                   "llama.cpp; repeat it.")  # fmt: skip
@click.option("--gguf", type=click.Path(), metavar="FILE", help="What llama.cpp runs.")
@click.option("--threads", default=0, type=click.IntRange(min=0),
              help="Of squizd's kernels and of llama.cpp.  [default: one for each core]")  # fmt: skip
@click.option("--check/--no-check", default=True, help="Compare logits with a resident model's.  [default: check]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def bench(file: str, check: bool, as_json: bool, **o: Any) -> int:
    """Measure FILE here: time to first token, tokens a second, hit rate, bytes read, memory, in trials.

    Exit code 1 where logits within the budget are not bit for bit those of a resident model (on CPU).

    Example: squizd bench qwen3.squizd --memory 6GB --against mlx-lm
    """
    need_mlx()
    from ..measuring import bench as run_bench
    from ..measuring import table

    with bar("bench", "trial") as progress:
        found = run_bench(file, checked=check, progress=progress, **o)
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(table(found)))
    return 1 if found.exact.failed else 0


@click.command("eval")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option("--text", required=True, type=click.Path(), help="Text to predict: jsonl, plain text, or a folder.")
@click.option("--reference", metavar="SOURCE", help="Compare with this checkpoint (in float32) or other .squizd file.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens of each text.")
@click.option(
    "--texts", default=40, show_default=True, type=click.IntRange(min=1), help="How many texts, evenly spread."
)
@click.option("--memory", metavar="SIZE", help="Budget for each FILE, as 6GB.")
@click.option(
    "--cache", type=click.Path(), help="Folder to keep the reference's results in.  [default: ~/.cache/squizd]"
)
@click.option("--report", type=click.Path(), help="Write a page that compares the files: KL divergence against bits.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per file.")
def evaluate(files: tuple[str, ...], text: str, report: str | None, cache: str | None, as_json: bool, **o: Any) -> None:
    """Measure FILE's perplexity on a text, and how far its answers are from a reference's.

    Example: squizd eval qwen3.squizd --reference Qwen/Qwen3-30B-A3B --text held-out.jsonl
    """
    need_mlx()
    from pathlib import Path

    from .. import corpus
    from .. import report as reports
    from ..evaluation import evaluate as run_evaluate

    found = []
    read = corpus.read(text)
    for file in files:
        with bar(os.path.basename(file), "text") as progress:
            found.append(run_evaluate(file, read, cache=Path(cache) if cache else None, progress=progress, **o))
        click.echo(json.dumps(found[-1].describe()) if as_json else _evaluated(found[-1]))
    if report:
        reports.write(report, found)


def _evaluated(r: Result) -> str:
    lines = [
        f"{r.file}: {r.bits_per_weight:.3f} bits per weight, perplexity {r.perplexity:.3f} ± {r.perplexity_error:.3f} "
        f"on {r.tokens} tokens of {r.texts} texts"
    ]
    if r.kld_mean is not None:
        lines.append(f"    reference perplexity {r.reference_perplexity:.3f}, top-1 agreement {r.top1_agreement:.2%}")
        lines.append(
            f"    KL divergence {r.kld_mean:.5f} ± {r.kld_mean_error:.5f}, median {r.kld_median:.5f}, "
            f"99 % {r.kld_99:.4f}, 99.9 % {r.kld_999:.4f}, max {r.kld_max:.4f}"
        )
        shares = " ".join(f"{share:.1%}" for share in r.router_agreement.values())
        lines += [f"    experts agree, layer by layer: {shares}"] if shares else []
    return "\n".join(lines)
