"""Flip each bit of a file in turn: deep validation must find every single one.

    python tools/fuzz/flips.py fixtures/valid/*.squizd
    python tools/fuzz/flips.py --seconds 600 --start 100000 fixtures/valid/aligned.squizd

Works on a copy in memory (/dev/shm where there is one). Prints a line for each file, as JSON: how many bits were
flipped, which flips nothing noticed (byte and bit), and, where --seconds ran out, the bit to go on with as --start.
Exits 1 if a flip went unnoticed. About 1,000 flips a second for a vector.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from squizd.container import validate

MEMORY = Path("/dev/shm")


def flip(path: Path, data: bytes, bits: Iterable[int], until: float = float("inf")) -> tuple[list[int], int]:
    """Flip `bits` of `data` one by one in a file at `path`.

    Returns those that deep validation does not notice, and how many were flipped before the clock said `until`.
    """
    path.write_bytes(data)
    unnoticed, done = [], 0
    with path.open("r+b", buffering=0) as f:
        for bit in bits:
            if time.monotonic() > until:
                break
            at = bit // 8
            f.seek(at)
            f.write(bytes([data[at] ^ 1 << bit % 8]))
            if validate(path, deep=True).ok:
                unnoticed.append(bit)
            f.seek(at)
            f.write(data[at : at + 1])
            done += 1
    if not validate(path, deep=True).ok:
        raise ValueError("the file is not valid to begin with, or was not put back")
    return unnoticed, done


def main() -> None:
    """Flip, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long, for all files together"
    )
    parser.add_argument("--start", type=int, default=0, help="the first bit, for every file")
    args = parser.parse_args()
    until, bad = time.monotonic() + args.seconds, False
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for source in args.files:
            data, began = source.read_bytes(), time.monotonic()
            bits = range(args.start, len(data) * 8)
            unnoticed, done = flip(Path(folder) / "flipped.squizd", data, bits, until)
            bad |= bool(unnoticed)
            report = {"file": source.name, "bits": len(data) * 8, "flipped": done}
            report |= {"unnoticed": [divmod(bit, 8) for bit in unnoticed[:100]], "missed": len(unnoticed)}
            report |= {"next": args.start + done if done < len(bits) else None}
            print(json.dumps(report | {"seconds": round(time.monotonic() - began)}), flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
