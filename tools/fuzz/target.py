"""Coverage-guided fuzzing of the reader and the deep validator, with atheris (libFuzzer for Python).

    make fuzz FUZZ_SECONDS=600                        starts from fixtures/, goes on with build/fuzz/corpus
    python tools/fuzz/target.py --seconds 600 --work build/fuzz
    python tools/fuzz/target.py --replay build/fuzz/corpus build/fuzz/crash-*       needs no atheris

An input is a file. It is validated, shallow and deep, opened, and if it opens every record, tensor and appendix is
read. Nothing but SquizdError may be raised; a valid file can be read whole; reader and validator name the same
first fault; validation takes at most 64 MiB more than before and the file's own size, and nothing may claim 1 GiB of
addresses; an input takes at most 20 seconds.

`mutators` makes digests right after most changes, so that those do not stop at the first digest. What breaks is kept
as crash-*, timeout-* or oom-* in --work. --replay says what a corpus reaches, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

atheris = None
if __name__ == "__main__" and "--replay" not in sys.argv:
    with contextlib.suppress(ImportError):
        import atheris

with atheris.instrument_imports(include=["squizd"]) if atheris else contextlib.nullcontext():
    from mutators import mutate

    from squizd import codecs  # noqa: F401  (read on demand: the instrumentation must see it)
    from squizd.container import faults, frames, open, payload, validate, validator
    from squizd.errors import FormatError, SquizdError

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
LARGEST = 1 << 18  # bytes of an input
GROWTH = 64 << 20  # bytes of memory that validation may take beside the file
ADDRESSES = 1 << 30  # bytes of addresses that all of it may claim
STATUS = Path("/proc/self/status")


class Broken(Exception):
    """A promise that was not kept."""


# -- the promises ----------------------------------------------------------------------------------------------


def check(path: Path, data: bytes) -> str:
    """Validate, open and read a file; returns its first fault, or an empty string. Anything raised is a finding."""
    path.write_bytes(data)
    before = memory("VmRSS", reset=True)
    report, deep = validate(path), validate(path, deep=True)
    grown = memory("VmHWM") - before
    if grown > GROWTH + len(data):
        raise Broken(f"validation took {grown >> 20} MiB")
    if not {fault.code for fault in deep.errors} <= set(faults.RULES):
        raise Broken("a code that the specification does not list")
    if not all(fault.message.isprintable() and len(fault.message) < 2000 for fault in deep.errors):
        raise Broken("a message that a terminal could misread")
    if not report.ok:
        if deep.errors != report.errors:
            raise Broken("deep validation says something else of the structure")
        try:
            open(path).close()
        except FormatError as error:
            if error.code != report.errors[0].code:
                raise Broken(f"the reader says {error.code}, the validator {report.errors[0].code}") from error
            return report.errors[0].code
        raise Broken("an invalid file was opened")
    with open(path) as f:
        reads = [f.bundle, *(lambda name=name: f.array(name) for name in f.residents)]
        reads += [lambda s=s: f.appendix(s.type) for s in f.sections]
        reads += [lambda x=x, i=i: f.expert_arrays(x.layer, i) for x in f.moe_layers for i in range(x.expert_count)]
        for read in reads:
            try:
                read()
            except SquizdError as error:
                if deep.ok:
                    raise Broken("a valid file cannot be read") from error
    return deep.errors[0].code if deep.errors else ""


def memory(key: str, reset: bool = False) -> int:
    """Bytes of memory of this process now (VmRSS) or at most since the last reset (VmHWM); 0 where unknown."""
    if not STATUS.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = STATUS.read_text()
    return int(text[text.index(key) :].split(maxsplit=2)[1]) << 10


def small_buffers() -> None:
    """Let small files go the way of large ones: read and decoded in pieces."""
    payload.PIECE = validator.PIECE = 1 << 12
    payload._DECODED = validator._DECODED = frames._STEP = 1 << 10


# -- running ---------------------------------------------------------------------------------------------------


def fuzz(work: Path, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    seeds, corpus = work / "seeds", work / "corpus"
    for folder in (seeds, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    for file in [*FIXTURES.glob("valid/*.squizd"), *FIXTURES.glob("invalid/*.squizd")]:
        if file.stat().st_size <= LARGEST:
            (seeds / file.name).write_bytes(file.read_bytes())
    path = work / "input.squizd"
    if hasattr(os, "memfd_create"):  # a file in memory that is gone with the process
        path = Path(f"/proc/self/fd/{os.memfd_create('input')}")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    options = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-timeout=20", "-rss_limit_mb=1024"]
    options += [f"-artifact_prefix={work}/", "-print_final_stats=1", "-len_control=0", str(corpus), str(seeds)]

    def one(data: bytes) -> None:
        check(path, data)

    def change(data: bytes, largest: int, seed: int) -> bytes:
        return mutate(data, largest, seed, atheris.Mutate)

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
    atheris.Fuzz()


def replay(files: list[Path], path: Path) -> None:
    """Check files once; a finding is raised."""
    reached: Counter[str] = Counter()
    for file in files:
        for one in sorted(file.iterdir()) if file.is_dir() else [file]:
            try:
                reached[check(path, one.read_bytes()) or "valid"] += 1
            except BaseException:
                print(f"in {one}", file=sys.stderr)
                raise
    codes = len(set(reached) - {"valid"})
    print(json.dumps({"files": reached.total(), "valid": reached["valid"], "codes": codes, "of": len(faults.RULES)}))


def main() -> None:
    """Fuzz or replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--replay", nargs="+", type=Path, help="files or folders of files to check once")
    args = parser.parse_args()
    small_buffers()
    if atheris is None and not args.replay:
        parser.error("atheris is not installed: make fuzz, or pip install atheris (Linux, Python up to 3.13)")
    if not args.replay:
        fuzz(args.work, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        replay(args.replay, Path(folder) / "input.squizd")


if __name__ == "__main__":
    main()
