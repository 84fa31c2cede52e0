"""What each step of compression is worth: an ablation over calibration seeds, with a random-allocation control.

    python benchmarks/quality.py --model CHECKPOINT --text eval.jsonl --calibration calibration.jsonl --out FOLDER

For each budget, uniform recipes (experts at the width below it in groups of 128, everything else 6 bits in groups of
64) with min-max, mse, activation-weighted mse and gptq; then gptq with bits allocated by layer, by layer and expert
(what a target does), with the same bits dealt at random among tensors of the same size and their experts, and with
bits allocated and counted as records under zstd take them. What needs
calibration runs once per seed. One JSON line per row; rows that FOLDER has already are not computed again, so an
interrupted run goes on. Files are deleted once evaluated.
At last a table, means over seeds, in Markdown; with --plot also the curve of everything in FOLDER as SVG.

    ... --targets 2.5 2.8 3.5 4.5 5.5 6.5 --variants allocated --seeds 0 --plot curve.svg
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

import squizd
from squizd import allocation, choosing, corpus, planning, report
from squizd.checkpoint import open_checkpoint
from squizd.evaluation import Result, evaluate
from squizd.guide import Calibration, prepare

UNIFORM = {6.5: "6g128", 5.5: "5g128", 4.5: "4g128", 3.5: "3g128", 2.8: "2g128", 2.5: "2g128"}
PLAIN = ("minmax", "mse")
CALIBRATED = ("weighted", "gptq", "layers", "allocated", "random", "zstd")


def plans(args: argparse.Namespace, seed: int, target: float, zstd: bool) -> dict[str, allocation.Plan]:
    """The allocated plans for a target, and the control; with `zstd` that plan under its name."""
    checkpoint = open_checkpoint(args.model)
    candidates, fixed, parameters = choosing.survey(checkpoint)
    kept = args.out / f"options-{'zstd-' * zstd}{seed}.json"
    if not kept.exists():
        guide = prepare(checkpoint, "gptq", calibration(args, seed), args.out / f"statistics-{seed}.npz")
        units = planning.measure(
            checkpoint, candidates, method="gptq", statistics=guide.statistics,
            windows=guide.windows[: choosing.SENSITIVITY_WINDOWS], zstd=zstd,
        )  # fmt: skip
        kept.write_text(json.dumps([asdict(unit) for unit in units]))
    units = []
    for facts in json.loads(kept.read_text()):
        options = [allocation.Option(**{**o, "experts": tuple(o["experts"])}) for o in facts["options"]]
        units.append(allocation.Unit(**{**facts, "options": tuple(options)}))
    budget = int(target * parameters) - fixed
    chosen = allocation.allocate(units, budget)
    if zstd:
        return {"zstd": planning.as_plan(units, chosen, fixed, parameters)}
    dealt = allocation.shuffled(units, chosen, seed)
    undivided = list(map(allocation.undivided, units))
    return {
        "layers": planning.as_plan(undivided, allocation.allocate(undivided, budget), fixed, parameters),
        "allocated": planning.as_plan(units, chosen, fixed, parameters),
        "random": planning.as_plan(units, dealt, fixed, parameters),
    }


def calibration(args: argparse.Namespace, seed: int) -> Calibration:
    """The calibration that a seed draws."""
    return Calibration(args.calibration, windows=args.windows, seed=seed)


def options(args: argparse.Namespace, variant: str, target: float, seed: int) -> dict[str, Any]:
    """Arguments of `compress` for a row."""
    spec = UNIFORM[target]
    uniform: dict[str, Any] = {
        "recipe": "mixed",
        "overrides": ["*=6g64", *([f"{m}.*={spec}" for m in args.modules]), *[f"{r}=8g64" for r in args.routers]],
    }
    if variant in PLAIN:
        return {**uniform, "quantizer": variant}
    learned = {"calibration": calibration(args, seed), "statistics": args.out / f"statistics-{seed}.npz"}
    if variant in ("weighted", "gptq"):
        return {**uniform, **learned, "quantizer": "mse" if variant == "weighted" else "gptq"}
    path = args.out / f"plan-{variant}-{target}-{seed}.json"
    plans(args, seed, target, variant == "zstd")[variant].save(path)
    return {**learned, "quantizer": "gptq", "plan": path, "zstd": variant == "zstd"}


def table(args: argparse.Namespace) -> str:
    """Means over seeds of every row in the folder that was asked for, as Markdown."""
    lines = ["| target | variant | seeds | bits per weight | KLD mean (of each seed) | 99.9 % | top-1 | perplexity |"]
    lines.append("|---" * 8 + "|")
    for target in args.targets:
        for variant in args.variants:
            kept = [args.out / f"row-{variant}-{target}-{seed}.json" for seed in args.seeds]
            found = [json.loads(path.read_text()) for path in kept if path.exists()]
            if not found:
                continue
            klds = [r["kld_mean"] for r in found]
            shown = ("bits_per_weight", "kld_mean_error", "kld_999", "top1_agreement", "perplexity")
            means = {key: float(np.mean([r[key] for r in found])) for key in shown}
            each = f" ({', '.join(f'{k:.4f}' for k in klds)})" if len(klds) > 1 else ""
            lines.append(
                f"| {target} | {variant} | {len(found)} | {means['bits_per_weight']:.3f} | {np.mean(klds):.4f} ± "
                f"{means['kld_mean_error']:.4f}{each} | {means['kld_999']:.3f} | {means['top1_agreement']:.1%} | "
                f"{means['perplexity']:.3f} |"
            )
    return "\n".join(lines)


def curve(folder: Path) -> str:
    """Every row in the folder, the first seed of each, as `squizd eval --report` draws them."""
    names, results = [], []
    for path in sorted(folder.glob("row-*.json")):
        facts = json.loads(path.read_text())
        name = f"{facts['variant']} {facts['target']:g}"
        if name not in names:
            names.append(name)
            results.append(Result(**{field.name: facts[field.name] for field in fields(Result) if field.name in facts}))
    return report.plot(names, results)


def rows(args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Every row, by seed."""
    for seed in args.seeds:
        for target in args.targets:
            for variant in args.variants:
                if variant in CALIBRATED or seed == args.seeds[0]:
                    yield variant, target, seed


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=float, nargs="+", default=[4.5, 3.5, 2.8], choices=list(UNIFORM))
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--variants", nargs="+", default=[*PLAIN, *CALIBRATED], choices=[*PLAIN, *CALIBRATED])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    candidates, _, _ = choosing.survey(open_checkpoint(args.model))
    args.modules = sorted({c.path.rpartition(".")[0] for c in candidates if c.role == "expert"})
    args.routers = [c.name for c in candidates if c.role == "router"]
    text = corpus.read(args.text)
    for variant, target, seed in rows(args):
        kept = args.out / f"row-{variant}-{target}-{seed}.json"
        if not kept.exists():
            began, file = time.perf_counter(), args.out / f"{variant}-{target}-{seed}.squizd"
            squizd.compress(args.model, file, force=True, **options(args, variant, target, seed))
            seconds = time.perf_counter() - began
            found = evaluate(
                str(file), text, texts=args.texts, reference=args.model, cache=args.out / "cache"
            ).describe()
            facts = {"variant": variant, "target": target, "seed": seed, "compress_seconds": seconds, **found}
            kept.write_text(json.dumps(facts))
            file.unlink()
        facts = json.loads(kept.read_text())
        wanted = ("variant", "target", "seed", "bits_per_weight", "perplexity", "kld_mean", "kld_mean_error", "kld_999",
                  "top1_agreement", "compress_seconds")  # fmt: skip
        print(json.dumps({key: facts[key] for key in wanted}), flush=True)
    print(table(args))
    if args.plot:
        args.plot.write_text(curve(args.out) + "\n")


if __name__ == "__main__":
    main()
