"""What zstd records save on the way to a reader, and what they cost there.

    python benchmarks/zstd.py FILE.squizd...

Repacks each file (raw records) with zstd and compares, in turns: size, seconds to repack, seconds until a process has
loaded all of the model, seconds to read and check every record. One JSON line for each file; exits 1 if a
repacked file does not hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import squizd
from squizd.repack import repack, same_payload

LOAD = "import sys, mlx.core as mx, squizd; m, _ = squizd.load(sys.argv[1]); mx.eval(m.parameters())"


def read_all(path: str) -> float:
    """Seconds to read, check and decode every record."""
    began = time.perf_counter()
    with squizd.open(path) as f:
        for name, (_, record) in f.residents.items():
            f.read(record, name)
        for layer in f.moe_layers:
            for expert in range(layer.expert_count):
                f.read_expert(layer.layer, expert)
    return time.perf_counter() - began


def load(path: str) -> float:
    """Seconds of a process that loads the whole model."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, path], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    failed = False
    for raw in args.files:
        with tempfile.TemporaryDirectory() as folder:
            packed, back = f"{folder}/zstd.squizd", f"{folder}/raw.squizd"
            began = time.perf_counter()
            repack(raw, packed, codec="zstd")
            seconds = time.perf_counter() - began
            repack(packed, back, codec="raw")
            with squizd.open(raw) as a, squizd.open(packed) as b:
                same = same_payload(a, b)
            times: dict[str, list[float]] = {key: [] for key in ("load raw", "load zstd", "read raw", "read zstd")}
            for _ in range(args.repeats):
                for codec, path in (("raw", back), ("zstd", packed)):
                    times[f"load {codec}"].append(load(path))
                    times[f"read {codec}"].append(read_all(path))
            sizes = os.path.getsize(back), os.path.getsize(packed)
        failed |= not same
        line = {"file": raw, "bytes": sizes[0], "zstd_bytes": sizes[1], "ratio": sizes[1] / sizes[0]}
        line |= {"repack_seconds": seconds, "same": same}
        print(json.dumps(line | {key: statistics.median(values) for key, values in times.items()}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
