"""Write a `.squizd` file again with wider experts: more bytes to read for each, the same choices of a router.

    python tools/widen.py small.squizd wide.squizd --width 4096

What is added to gate, up and down projections is zero, so answers stay what they were. For measuring reads of large
experts with the routing of a trained model. Affine encodings only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import squizd
from squizd.container import File, Plan, Writer
from squizd.container.layout import Layout, Tensor, make_layout
from squizd.container.writer import choose_alignment


def widened(tensor: Tensor, width: int) -> tuple[int, ...]:
    """The new shape: rows of gate and up, columns of down."""
    return (tensor.shape[0], width) if tensor.name.startswith("down") else (width, *tensor.shape[1:])


def parts(tensor: Tensor, to: Tensor, raw: memoryview) -> Iterator[np.ndarray]:
    """The parts of `tensor` in `raw`, zeros added."""
    for (_, offset, size), (_, _, wanted) in zip(tensor.parts, to.parts, strict=True):
        rows = np.zeros((to.shape[0], wanted // to.shape[0]), np.uint8)
        old = np.frombuffer(raw[offset : offset + size], np.uint8).reshape(tensor.shape[0], -1)
        rows[: old.shape[0], : old.shape[1]] = old
        yield rows.reshape(-1)


def write(source: File, target: str, width: int) -> None:
    """One record in memory at a time."""
    wide = [make_layout([(t.name, t.role, t.encoding, widened(t, width)) for t in x.tensors]) for x in source.layouts]
    model = source.metadata["model"]
    config = model["config"] | {"moe_intermediate_size": width}
    records = [source.experts(x.layer) for x in source.moe_layers]
    plan = Plan(
        {**source.metadata, "model": model | {"config": config}},
        [(name, t.role, t.encoding, t.shape) for name, (t, _) in source.residents.items()],
        source.bundle(),
        wide,
        list(source.moe_layers),
        [[r.layout for r in layer] for layer in records],
        choose_alignment([x.raw_size for x in wide]),
    )
    layouts: tuple[Layout, ...] = source.layouts
    with Writer(target, plan) as writer:
        for name, (tensor, record) in source.residents.items():
            raw = source.read(record, name)
            writer.write([[raw[at : at + size] for _, at, size in tensor.parts]])
        for layer in source.moe_layers:
            for expert in range(layer.expert_count):
                old = source.expert(layer.layer, expert).layout
                raw = source.read_expert(layer.layer, expert)
                pairs = zip(layouts[old].tensors, wide[old].tensors, strict=True)
                writer.write([list(parts(a, b, raw)) for a, b in pairs])
        writer.finish()


def main() -> None:
    """Parse the arguments and write the file; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("output")
    parser.add_argument("--width", type=int, default=4096, help="of an expert (default: %(default)s)")
    options = parser.parse_args()
    with squizd.open(options.file) as source:
        write(source, options.output, options.width)
    print(json.dumps({"path": options.output, "bytes": Path(os.fspath(options.output)).stat().st_size}))


if __name__ == "__main__":
    main()
