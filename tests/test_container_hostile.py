"""Files made to hurt: whatever they claim, the reader answers with a SquizdError, soon, and in little memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from squizd.container import faults, validate
from squizd.container import layout as L
from squizd.container import open as open_file
from squizd.errors import FormatError, SquizdError

ROOT = Path(__file__).parent.parent
VALID = ROOT / "fixtures" / "valid"
VECTORS = {p.stem: p.read_bytes() for p in sorted(VALID.glob("*.squizd")) if p.stem not in ("aligned", "line-limits")}
HEAD_ENTRIES = {L.FILE: L.EMBEDDED, L.TENS: L.RESIDENT, L.MOEL: L.MOE_LAYER, L.EXPI: L.EXPERT}
INTERESTING = [0, 1, 2, 3, 63, 64, 65, 255, 256, 4096, 1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 36, 1 << 48, 1 << 63]
INTERESTING += [(1 << 64) - 1, (1 << 64) - 64, (1 << 32) - 1, (1 << 36) + 1]


def section_spans(data: bytes | bytearray) -> dict[bytes, tuple[int, int]]:
    """Where the sections of an unharmed file lie."""
    count = int(np.frombuffer(data, L.HEADER, 1)["directory_count"][0])
    entries = np.frombuffer(data, L.SECTION, count, L.HEADER_SIZE)
    return {bytes(e["type"]): (int(e["offset"]), int(e["stored_size"])) for e in entries}


def reseal(data: bytearray, spans: dict[bytes, tuple[int, int]]) -> None:
    """Digests of sections that lie where they did, of the directory and of the header."""
    count = (min(start for start, _ in spans.values()) - L.HEADER_SIZE) // L.DIRECTORY_ENTRY_SIZE
    entries = np.frombuffer(data, L.SECTION, count, L.HEADER_SIZE)
    for e in entries:
        start, size = spans.get(bytes(e["type"]), (0, 0))
        if size and e["digest"]:
            e["digest"] = xxhash.xxh64_intdigest(bytes(data[start : start + size]))
    header = np.frombuffer(data, L.HEADER, 1)
    directory = bytes(data[L.HEADER_SIZE : L.HEADER_SIZE + count * L.DIRECTORY_ENTRY_SIZE])
    header["directory_digest"] = xxhash.xxh64_intdigest(directory)
    header["header_digest"] = xxhash.xxh64_intdigest(bytes(data[:248]))


def survive(path: Path, data: bytes) -> None:
    """Open, validate and read: a valid file can be read whole, an invalid one is refused with the first code."""
    path.write_bytes(data)
    report = validate(path)
    deep = validate(path, deep=True)
    assert {e.code for e in deep.errors} <= set(faults.RULES)
    assert all(e.message.isprintable() and len(e.message) < 2000 for e in deep.errors)
    if not report.ok:
        assert deep.errors == report.errors
        with pytest.raises(FormatError) as caught:
            open_file(path)
        assert caught.value.code == report.errors[0].code
        return
    with open_file(path) as f, contextlib.nullcontext() if deep.ok else contextlib.suppress(SquizdError):
        f.bundle()
        for name in f.residents:
            f.array(name)
        for layer in f.moe_layers:
            for i in range(layer.expert_count):
                f.expert_arrays(layer.layer, i)
        for s in f.sections:
            f.appendix(s.type)


numbers = st.sampled_from(INTERESTING) | st.integers(0, (1 << 64) - 1)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_forged_fields(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One to three fields of header, directory and indexes, anywhere, with every digest made right again."""
    name = data.draw(st.sampled_from(sorted(VECTORS)))
    forged = bytearray(VECTORS[name])
    spans = section_spans(forged)
    for _ in range(data.draw(st.integers(1, 3))):
        indexes = [kind for kind in spans if kind in HEAD_ENTRIES or kind == L.LAYT]
        kind = data.draw(st.sampled_from(["header", "directory", *indexes]))
        if kind == "header":
            start, size = 0, 80
        elif kind == "directory":
            start, size = L.HEADER_SIZE, len(spans) * L.DIRECTORY_ENTRY_SIZE
        else:
            start, size = spans[kind]
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        at = start + data.draw(st.integers(0, size // width - 1)) * width
        old = int.from_bytes(forged[at : at + width], "little")
        new = data.draw(numbers | st.sampled_from([old + 1, old - 1, old + 64, old * 2, old ^ 1]))
        forged[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    reseal(forged, spans)
    survive(tmp_path_factory.getbasetemp() / "forged.squizd", bytes(forged))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_forged_payload(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of records, metadata, names and appendices, with every digest made right again."""
    name = data.draw(st.sampled_from(["zstd-records", "appendices", "unknown", "microscaling-modes", "layouts"]))
    forged = bytearray(VECTORS[name])
    spans = section_spans(forged)
    records = [
        np.frombuffer(forged, entry, spans[kind][1] // entry.itemsize, spans[kind][0])["record"]
        for kind, entry in HEAD_ENTRIES.items()
        if kind in spans and kind != L.MOEL
    ]
    places = [(int(r["offset"]), int(r["stored_size"])) for some in records for r in some]
    places += [spans[kind] for kind in spans if kind not in HEAD_ENTRIES and kind not in (L.LAYT, *L.DATA_SECTIONS)]
    for _ in range(data.draw(st.integers(1, 4))):
        start, size = data.draw(st.sampled_from(places))
        forged[start + data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    for some in records:
        for r in some:
            start = int(r["offset"])
            r["digest"] = xxhash.xxh64_intdigest(bytes(forged[start : start + int(r["stored_size"])]))
    reseal(forged, spans)
    survive(tmp_path_factory.getbasetemp() / "payload.squizd", bytes(forged))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(VECTORS)), st.data())
def test_cut_and_spliced(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """A file that ends too soon, has bytes left out, or goes on with another file."""
    whole = VECTORS[name]
    at, to = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    tail = data.draw(st.sampled_from([b"", whole[to:], VECTORS["toy"][at:], bytes(100)]))
    survive(tmp_path_factory.getbasetemp() / "cut.squizd", whole[:at] + tail)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_behind_a_magic_number(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    survive(tmp_path_factory.getbasetemp() / "bytes.squizd", L.MAGIC + b"\1\0" + data)


# -- memory ------------------------------------------------------------------------------------------------------

BUILD = """
import sys
import numpy as np, xxhash
from squizd.container import Plan, Writer
from squizd.container import layout as L
from squizd.container.plan import HeadPlan
path = sys.argv[1]
M = {"model": {"config": {"model_type": "m"}}, "recipe": {}, "provenance": {}}
F32 = L.Encoding("raw", "f32")

def write(head, size):
    with open(path, "wb") as f:
        f.write(head.assemble(size))
        f.truncate(size)

def document(start, stop):
    "As many objects as there may be, in chains as deep as they may be, and a string of the widest characters."
    chain = '{"":' * 29 + "0" + "}" * 29 + ","
    start += chain * ((L.MAX_JSON_TOKENS - 16) // 30) + '"'
    return (start + "a" * (L.MAX_JSON_SIZE - len(start + stop) - 5) + "\U0001f600" + '"' + stop).encode()

def most():
    "A plan of as many tensors, layouts, experts and bytes of names as there may be."
    names = [f"{i:05d}" + "n" * 60 + "\U0001f600" * 14 for i in range(L.MAX_TENSORS)]
    affine = L.Encoding("affine", "f32", 4, 32)
    residents = [(name, "dense", affine, (1, 1, 1, 32)) for name in names]
    shared = [(f"{i}.weight", "expert", affine, (1, 1, 1, 32)) for i in range(7)]
    layouts = [L.make_layout([*shared, (f"x{j}", "expert", F32, (64,))]) for j in range(L.MAX_LAYOUTS)]
    layers = [L.MoeLayer(i, f"e{i}", 32) for i in range(L.MAX_MOE_LAYERS)]
    return Plan(M, residents, {}, layouts, layers, [[0] * 32] * len(layers), 64)

def place(head):
    "Records that lie where they should; where the last ends."
    def fill(r, start, size):
        r["offset"] = start + np.arange(len(r)) * L.align(size, 64)
        r["stored_size"] = r["raw_size"] = size
        return int(r["offset"][-1]) + size

    end = fill(head.residents["record"], L.align(head.size, 64), 132)
    return L.align(fill(head.experts["record"], L.align(end, 64), head.tensors[-1][1]), 64)
"""

MEASURE = """
import sys, time
from squizd.container import validate
validate(sys.argv[2], deep=True)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

open("/proc/self/clear_refs", "w").write("5")
before, began = peak(), time.process_time()
report = validate(sys.argv[1], deep=True)
print(peak() - before, time.process_time() - began, len(report.errors), report.errors[0].code if report.errors else "-")
"""

# name: (program that writes the file, faults that are reported, the first of them)
WORST: dict[str, tuple[str, int, str]] = {
    "the largest metadata": (
        """
        meta = document('{"model":{"config":{"model_type":"m"}},"provenance":{},"recipe":{},"x":[', "]}")
        head = HeadPlan(Plan(M, [("w", "norm", F32, (1,))]))
        head.sections[L.META] = meta
        end = L.HEADER_SIZE + 64 * 4
        for kind, content in head.sections.items():
            at = L.align(end, 64)
            head.spans[kind], end = (at, len(content)), at + len(content)
        head.size = end
        at = L.align(end, 64)
        head.residents["record"][0] = (at, 4, 4, 0, 0, b"", xxhash.xxh64_intdigest(bytes(4)))
        write(head, at + 4)
        """,
        0,
        "-",
    ),
    "all of that, the longest lines, and as many tensors, layouts, experts and bytes of names as there may be": (
        """
        meta = document('{"model":{"config":{"model_type":"m"}},"provenance":{},"recipe":{},"x":[', "]}")
        plan = most()
        plan.metadata["x"] = "a" * (len(meta) - 74)
        lines = document('{"appendix":"profile","version":2,"x":[', "]}") + b"\\n" + document("[", "]") + b"\\n"
        plan.appendices[L.PROF] = lines
        head = HeadPlan(plan)
        assert len(meta) == len(head.sections[L.META])
        head.sections[L.META] = meta
        at = place(head)
        head.appendices[L.PROF] = at, len(lines), len(lines), L.RAW, xxhash.xxh64_intdigest(lines)
        write(head, at + len(lines))
        with open(path, "r+b") as f:
            f.seek(at)
            f.write(lines)
        """,
        1000,
        "record-digest",
    ),
    "frames that decode to 64 times their size": (
        """
        raw = np.random.default_rng(0).bytes(1040000) + bytes(64000000)
        shape = (len(raw) // 4,)
        plan = Plan(M, [(name, "dense", F32, shape) for name in "vwxy"], codec=L.ZSTD)
        with Writer(path, plan) as w:
            for _ in "vwxy":
                w.write([[raw]])
            w.finish()
        """,
        0,
        "-",
    ),
    "records of 142 MB in a file that is a hole": (
        """
        head = HeadPlan(Plan(M, [(n, "dense", L.Encoding("affine", "f16", 8, 32), (1, 1 << 27)) for n in "vw"]))
        size, at = head.tensors[0][1], L.align(head.size, 64)
        digest, zeros = xxhash.xxh64(), bytes(1 << 20)
        for done in range(0, size, 1 << 20):
            digest.update(zeros[: size - done])
        for i in range(2):
            head.residents["record"][i] = (at, size, size, 0, 0, b"", digest.intdigest())
            at = L.align(at + size, 64)
        write(head, int(head.residents["record"]["offset"][1]) + size)
        """,
        0,
        "-",
    ),
    "an index whose every entry breaks six rules": (
        """
        count = L.MAX_EXPERT_RECORDS
        layouts, layers = [L.make_layout([("w", "expert", F32, (1,))])], [L.MoeLayer(0, "e", count)]
        head = HeadPlan(Plan(M, [("w", "norm", F32, (1,))], {}, layouts, layers, [[0] * count], 64))
        at = L.align(head.size, 64)
        head.residents["record"][0] = (at, 4, 4, 0, 0, b"", 0)
        r = head.experts["record"]
        r["offset"] = np.arange(count) * 64 + at + 64
        r["codec"], r["layout"], r["reserved"], r["stored_size"] = 9, 9, b"xxxx", (1 << 64) - 1
        r["stored_size"][-1] = 4
        write(head, int(r["offset"][-1]) + 64)
        """,
        1000,
        "record-codec",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("name", WORST)
def test_memory_stays_below_64_mb(tmp_path: Path, name: str) -> None:
    """Peak memory of deep validation over that of the idle process, in a process that did nothing else."""
    program, count, code = WORST[name]
    worst = str(tmp_path / "worst.squizd")
    run(BUILD + textwrap.dedent(program), worst)
    megabytes, seconds, *found = run(MEASURE, worst, str(VALID / "toy.squizd")).split()
    print(f"{float(megabytes):.1f} MB, {float(seconds):.2f} s")
    assert found == [str(count), code]
    assert float(megabytes) < 64
    assert float(seconds) < 10


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
