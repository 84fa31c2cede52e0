"""Mutated vectors through the package's deep validation, reader.c and reader.py: do they agree, does anything break?

    cc -std=c11 -O2 tools/readers/reader.c -o build/reader -lzstd -lm
    python tools/fuzz/compare.py --reader build/reader --count 200000

reader.py decodes zstd only with Python 3.14 or later (or a `compression.zstd` in PYTHONPATH): where it says that it
left something out, its "valid" is not compared.
Bit flips, forged integers, cuts, splices and insertions; most files get their digests recomputed, so that the
fault itself is what is found. Files that break or disagree are kept in --keep. The last line is JSON; exits 1 if
there was any.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import xxhash

import squizd

VALID = Path(__file__).parent.parent.parent / "fixtures" / "valid"
READER = Path(__file__).parent.parent / "readers" / "reader.py"
NUMBERS = (0, 1, 64, 16384, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
HEAD = 4096  # most rules concern the first bytes
BATCH = 400
DATA_SECTIONS = (b"BNDL", b"RESD", b"SHRD")


def reseal(data: bytearray) -> bytearray:
    """Recompute the digests of sections, directory and header where the directory still leads to them."""
    if len(data) < 256:
        return data
    count = min(struct.unpack_from("<I", data, 48)[0], 64, (len(data) - 256) // 64)
    for at in range(256, 256 + 64 * count, 64):
        offset, size = struct.unpack_from("<QQ", data, at + 8)
        if bytes(data[at : at + 4]) not in DATA_SECTIONS and offset + size <= len(data):
            struct.pack_into("<Q", data, at + 40, xxhash.xxh64_intdigest(bytes(data[offset : offset + size])))
    struct.pack_into("<Q", data, 56, xxhash.xxh64_intdigest(bytes(data[256 : 256 + 64 * count])))
    struct.pack_into("<Q", data, 248, xxhash.xxh64_intdigest(bytes(data[:248])))
    return data


def mutate(source: random.Random, vectors: list[bytes]) -> bytes:
    """One to three changes to one of the vectors."""
    data = bytearray(source.choice(vectors))
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        at, kind = source.randrange(len(data)), source.random()
        near = source.randrange(min(len(data), HEAD))
        if kind < 0.4:
            data[near] ^= 1 << source.randrange(8)
        elif kind < 0.6:
            number = source.choice((*NUMBERS, source.getrandbits(64)))
            data[near : near + 8] = struct.pack("<Q", number)[: len(data) - near]
        elif kind < 0.75:
            del data[at + 1 :]
        elif kind < 0.9:
            other, size = source.choice(vectors), source.randrange(1, 256)
            start = source.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        else:
            data[at:at] = source.randbytes(source.choice((1, 8, 64)))
    return bytes(reseal(data) if source.random() < 0.8 else data)


def ours(path: Path) -> str:
    """ "valid", "invalid", or what escaped."""
    try:
        return "valid" if squizd.validate(path, deep=True).ok else "invalid"
    except squizd.SquizdError:
        return "unreadable"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def theirs(reader: list[str], paths: list[Path]) -> dict[str, str]:
    """A reader's first word on each file, by name; what it left out stands beside it."""
    done = subprocess.run([*reader, "verify", *map(str, paths)], capture_output=True, text=True, timeout=900)
    lines = (line.rpartition(".squizd: ") for line in done.stdout.splitlines())
    words = {Path(path).name: verdict for path, found, verdict in lines if found}
    return {name: verdict if verdict.startswith("valid (") else verdict.split()[0] for name, verdict in words.items()}


def disagree(verdict: str, others: dict[str, str | None]) -> bool:
    """Whether a reader says something else than the package, and not because it left out what is coded."""
    skipped = "valid (zstd records skipped)"
    return any(other != verdict and other != skipped for other in others.values())


def main() -> None:
    """Mutate, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="reader.c, compiled; left out without it")
    parser.add_argument("--python-reader", type=Path, default=READER, help="reader.py; deep.py lies beside it")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    args = parser.parse_args()
    readers = {"reader.py": [sys.executable, str(args.python_reader)]}
    if args.reader:
        readers["reader.c"] = [args.reader]
    paths = [p for p in sorted(VALID.glob("*.squizd")) if p.stem != "line-limits"]  # decodes to 2 MB: slow
    source, vectors = random.Random(args.seed), [p.read_bytes() for p in paths]
    found = {"files": 0, "valid": 0, "differences": 0}
    with tempfile.TemporaryDirectory() as folder:
        while found["files"] < args.count:
            paths = [Path(folder) / f"{found['files'] + i}.squizd" for i in range(BATCH)]
            for path in paths:
                path.write_bytes(mutate(source, vectors))
            verdicts = {name: theirs(reader, paths) for name, reader in readers.items()}
            for path in paths:
                verdict = ours(path)
                found["valid"] += verdict == "valid"
                others = {name: words.get(path.stem) for name, words in verdicts.items()}
                if disagree(verdict, others):
                    found["differences"] += 1
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{args.seed}-{path.name}").write_bytes(path.read_bytes())
                    print(f"{path.name}: {verdict}, others {others}", file=sys.stderr)
                path.unlink()
            found["files"] += BATCH
    print(json.dumps(found))
    sys.exit(found["differences"] > 0)


if __name__ == "__main__":
    main()
