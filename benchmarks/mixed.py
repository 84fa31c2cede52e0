"""What do experts of several widths in one layer cost to run, against the same experts all stored wide? In turns.

    python benchmarks/mixed.py MIXED
    python benchmarks/mixed.py NARROW --and WIDE

MIXED is a file whose layers have experts of several widths; or every other expert comes from each of two files that
differ in the bits of their experts only. The same values are written once more with all codes as wide as the widest of
their layer, and decode at each residency is timed in the trials of `squizd bench`. Prints one JSON line: tokens a
second, ratios of each round, bytes read a token, file sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import squizd
from squizd.container import File, Plan, Writer
from squizd.container.layout import Layout, make_layout
from squizd.container.writer import choose_alignment
from squizd.measuring import PROMPT
from squizd.runtime.load import load_tokenizer
from squizd.runtime.widening import widen_codes
from squizd.sides import Side
from squizd.trials import compare, rate, ratios, summary

SHARES = ("100%", "50%", "25%")


def write(files: Sequence[File], target: str, wide: bool) -> None:
    """Residents of the last file, experts from each of `files` by turns; if `wide`, as wide as their layer's widest."""
    main = files[-1]
    layouts: list[Layout] = []
    chosen: list[list[tuple[File, int]]] = []  # of each layer and expert: the file, and its number in `layouts`
    for layer in main.moe_layers:
        sources = [files[expert % len(files)] for expert in range(layer.expert_count)]
        stored = [f.layouts[f.expert(layer.layer, e).layout] for e, f in enumerate(sources)]
        most = [max(x.tensors[i].encoding.bits for x in stored) for i in range(len(stored[0].tensors))]
        chosen.append([])
        for source, layout in zip(sources, stored, strict=True):
            bits = most if wide else [t.encoding.bits for t in layout.tensors]
            tensors = zip(layout.tensors, bits, strict=True)
            made = make_layout([(t.name, t.role, replace(t.encoding, bits=b), t.shape) for t, b in tensors])
            layouts += [] if made in layouts else [made]
            chosen[-1].append((source, layouts.index(made)))
    plan = Plan(
        main.metadata,
        [(name, t.role, t.encoding, t.shape) for name, (t, _) in main.residents.items()],
        main.bundle(),
        layouts,
        list(main.moe_layers),
        [[number for _, number in layer] for layer in chosen],
        choose_alignment([layouts[number].raw_size for layer in chosen for _, number in layer]),
    )
    with Writer(target, plan) as writer:
        for name, (tensor, record) in main.residents.items():
            raw = main.read(record, name)
            writer.write([[raw[at : at + size] for _, at, size in tensor.parts]])
        for layer, experts in zip(main.moe_layers, chosen, strict=True):
            for expert, (source, number) in enumerate(experts):
                raw = np.frombuffer(source.read_expert(layer.layer, expert), np.uint8)
                record = []
                old = source.layouts[source.expert(layer.layer, expert).layout]
                for tensor, made in zip(old.tensors, layouts[number].tensors, strict=True):
                    parts = [raw[at : at + size] for _, at, size in tensor.parts]
                    if tensor.encoding.bits != made.encoding.bits:
                        codes, parts[0] = parts[0], np.empty(made.codes[1], np.uint8)
                        widen_codes(codes, (tensor.encoding.bits, made.encoding.bits), parts[0])
                    record.append(parts)
                writer.write(record)
        writer.finish()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--and", dest="other", help="a second file, which every other expert comes from")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        paths = {kind: f"{name}/{kind}.squizd" for kind in ("mixed", "wide")}
        files = [squizd.open(path) for path in (args.file, args.other) if path]
        for kind, path in paths.items():
            write(files, path, kind == "wide")
        prompt = list(load_tokenizer(paths["wide"]).encode(PROMPT))
        sides = [Side(f"{kind} {s}", "squizd", path, resident=s) for s in SHARES for kind, path in paths.items()]
        found, _ = compare(sides, prompt, args.tokens, args.repeats)
        sizes = {kind: Path(path).stat().st_size for kind, path in paths.items()}
    result = {
        "tokens_per_second": {side: round(statistics.median(map(rate, trials)), 1) for side, trials in found.items()},
        "mixed / wide": {share: ratios(found[f"mixed {share}"], found[f"wide {share}"], rate) for share in SHARES},
        "bytes_read_per_token": {side: summary(trials)["bytes_read_per_token"] for side, trials in found.items()},
        "read_seconds": {side: round(sum(t.read_seconds for t in trials), 4) for side, trials in found.items()},
        "file_bytes": sizes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
