"""Deep validation against a plain sequential read and XXH64 of the same file, both warm, in turns.

    python benchmarks/validate.py FILE

Prints one JSON line; a ratio of 1 means that every rule is checked as fast as the bytes can be hashed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import xxhash

import squizd


def plain(path: str) -> float:
    """Seconds to read and hash the file."""
    began, digest = time.perf_counter(), xxhash.xxh64()
    with open(path, "rb", buffering=0) as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return time.perf_counter() - began


def deep(path: str) -> float:
    """Seconds to validate it."""
    began = time.perf_counter()
    assert squizd.validate(path, deep=True).ok
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    times = [(plain(args.file), deep(args.file)) for _ in range(args.repeats + 1)][1:]
    seconds = [statistics.median(side) for side in zip(*times, strict=True)]
    size = os.path.getsize(args.file)
    print(json.dumps({"bytes": size, "plain_s": seconds[0], "deep_s": seconds[1], "ratio": seconds[0] / seconds[1]}))


if __name__ == "__main__":
    main()
