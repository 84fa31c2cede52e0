"""`squizd compress`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from .shared import need_mlx, size

_KNOWN_RECIPES = "int8, int4, int3, int2, mixed (experts 4, rest 8), mixed3, mixed2, mxfp4, keep"


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(), help="The file to write.  [default: NAME-RECIPE.squizd]")
@click.option("--recipe", default="int4", show_default=True, help=f"Encodings: {_KNOWN_RECIPES}.")
@click.option("--quantizer",
              help="gptq (feedback; needs --calibration, then the default), mse (fitted; the default without), "
                   "or minmax (as mlx-lm quantizes).")  # fmt: skip
@click.option("--override", "overrides", multiple=True, metavar="PATTERN=SPEC",
              help="Encoding for tensor paths that match, the last match wins; "
                   "SPEC: keep, mxfp4, mxfp8, nvfp4, or bits 2-8 as 4 or 4g32.")  # fmt: skip
@click.option("--calibration", metavar="PATH", help="Text to weigh weights by: jsonl, plain text, or a folder.")
@click.option("--windows", default=256, show_default=True, type=click.IntRange(min=1), help="How much of it.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens of each window.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws the windows.")
@click.option("--statistics", metavar="FILE", help="Keep what was learned from the text here, or take it from here.")
@click.option("--target-bpw", type=click.FloatRange(min=1, max=16), metavar="BITS",
              help="Choose encodings for this many stored bits per weight; needs --calibration.")  # fmt: skip
@click.option("--target-size", metavar="SIZE", help="The same for a file of at most this size, as 16GB.")
@click.option("--alike", is_flag=True,
              help="With a target, one encoding for all experts of a layer, so that none takes the room of a wider one "
                   "in memory: more loss in a file of that size.")  # fmt: skip
@click.option("--plan", metavar="FILE", help="Encodings by tensor, as --save-plan wrote them and you may have edited.")
@click.option("--save-plan", metavar="FILE", help="Write the encodings that were chosen.")
@click.option("--plan-only", is_flag=True, help="Print the plan and stop.")
@click.option("--revision", help="Branch, tag or commit of a repository.")
@click.option("--keep-source", is_flag=True, help="Keep a repository's shards in the hub's cache.")
@click.option("--zstd", is_flag=True, help="Compress records with zstd: smaller to ship, slower to page.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def compress(source: str, output: str | None, recipe: str, as_json: bool, plan_only: bool, **options: Any) -> None:
    """Turn a Hugging Face checkpoint SOURCE (repository id or folder) into one .squizd file.

    Interrupted, it leaves OUTPUT.partial; the same command goes on from there.

    Example: squizd compress Qwen/Qwen3-30B-A3B -o qwen3.squizd --recipe mixed
    """
    need_mlx()
    from tqdm import tqdm

    from ..compression import compress as run_compress
    from ..compression import plan as run_plan

    amount = {key: options.pop(key) for key in ("windows", "context", "seed")}
    if options["calibration"] is not None:
        from ..guide import Calibration

        options["calibration"] = Calibration(options["calibration"], **amount)
    if options["target_size"] is not None:
        from ..runtime.budget import parse_size

        options["target_size"] = parse_size(options["target_size"])
    chosen = f"{options['target_bpw']}bpw" if options["target_bpw"] else "plan" if options["plan"] else recipe
    target = output or f"{os.path.basename(os.path.abspath(source))}-{chosen}.squizd"
    calibrating = tqdm(unit="layer", desc="calibrate", disable=None, leave=False, delay=0.5)

    def preparing(done: int, total: int) -> None:
        if done < calibrating.n:  # the next pass
            calibrating.reset(total)
        calibrating.total = total
        calibrating.update(done - calibrating.n)

    options["preparing"] = preparing
    if plan_only:
        wanted = ("quantizer", "overrides", "calibration", "statistics", "target_bpw", "target_size", "plan",
                  "save_plan", "alike", "zstd", "revision", "preparing")  # fmt: skip
        made = run_plan(source, **{key: options[key] for key in wanted})
        calibrating.close()
        click.echo(json.dumps(asdict(made)) if as_json else made.describe())
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="compress", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total is None:
                calibrating.close()
                bar.reset(total)
                bar.initial = done
            bar.update(done - bar.n)

        s = run_compress(source, target, recipe=recipe, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(asdict(s)))
        return
    if s.recipe == "keep" != recipe:
        click.echo(f"{source} is quantized for MLX already: stored as it comes, recipe {recipe} not applied", err=True)
    if s.unquantized:
        click.echo(
            f"not quantized, their rows fit no group: {len(s.unquantized)} tensors ({s.unquantized[0]}, ...)", err=True
        )
    resumed = f", resumed after {s.resumed} records" if s.resumed else ""
    memory = (
        "" if s.memory_bits_per_weight <= s.bits_per_weight + 0.01 else f" ({s.memory_bits_per_weight:.3f} in memory)"
    )
    click.echo(
        f"{s.path}: {size(s.source_bytes)} -> {size(s.file_bytes)}, {s.parameters / 1e6:,.1f} M parameters, "
        f"{s.bits_per_weight:.3f} bits per weight{memory}, {s.seconds:.1f} s{resumed}"
    )
