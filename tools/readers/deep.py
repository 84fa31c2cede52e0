"""The rules of .squizd files that reader.py leaves out: zstd frames (13), values (15) and appendices (17).

reader.py calls `verify` and `payload` where this file lies beside it. Numbers in parentheses are sections of
spec/squizd.md. `f` is what reader.read returns: the file's bytes, its metadata, and its entries by kind.
"""

import re
import struct
from itertools import pairwise

from reader import LETTERS, Bad, check, document, xxh64

try:
    from compression import zstd  # Python 3.14 and later
except ImportError:
    zstd = None

INFINITY = {1: 0x7F800000, 2: 0x7C00, 3: 0x7F80}  # of f32, f16, bf16; the largest finite number is the one below
TOP_SCALE = {2: (0, 252, 140, 252), 3: (0, 246, 134, 246), 4: (0, 255, 255, 255)}  # of a mode, by dtype
NANS = {  # of a mode: part, code, bytes that are not numbers
    2: [(1, "e8m0-nan", b"\xff")],
    3: [(1, "e8m0-nan", b"\xff"), (0, "e4m3-nan", b"\x7f\xff")],
    4: [(1, "e4m3-nan", b"\x7f\xff")],
}
TYPES = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: type(v) is int,
    "number": lambda v: type(v) in (int, float),
    "count": lambda v: type(v) is int and v >= 0,
    "digest": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v),
    "sha256": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v),
    "triple": lambda v: isinstance(v, list) and [type(x) for x in v] == [int] * 3,
}
KINDS = {"PROF": "profile", "SPRS": "sparsity", "DRFT": "draft"}
HEADERS = {
    "profile": {"tokens": "count", "text_sha256": "sha256"},
    "sparsity": {},
    "draft": {
        "kind": "string",
        "hidden": "count",
        "source_layers": ["integer"],
        "tensors": [{"name": "string", "digest": "digest"}],
    },
}
CLUSTERS = {
    "clusters": "integer",
    "boundaries": ["integer"],
    "histogram": ["number"],
    "predictor": {"kind": "string"},
    "digest": "digest",
}
LINES = {
    "profile": {"layer": "count", "counts": ["integer"], "gate_mass": ["number"], "coactivation?": ["triple"]},
    "sparsity": {"layer": "count", "width": "count", "experts": [CLUSTERS]},
}


def has(value, kind):
    """Tell whether a value has the members and types of a schema; a question mark follows optional members."""
    if isinstance(kind, dict):
        there = isinstance(value, dict) and all(key[-1] == "?" or key in value for key in kind)
        return there and all(has(value[k], v) for key, v in kind.items() if (k := key.rstrip("?")) in value)
    if isinstance(kind, list):
        return isinstance(value, list) and all(has(item, kind[0]) for item in value)
    return bool(TYPES[kind](value))


def frame(data, at, raw_size):
    """Check the structure of a zstd frame; return the place of its checksum."""
    size, head = len(data), bytes(data[:18]).ljust(18, b"\0")
    check(at, zstd_skippable=head[0] >> 4 != 5 or head[1:4] != b"\x2a\x4d\x18", zstd_magic=head[:4] == b"(\xb5/\xfd")
    flags, single = head[4], head[4] >> 5 & 1
    field = (single, 2, 4, 8)[flags >> 6]  # bytes of the content size, which ends the header
    place = 6 - single + (0, 1, 2, 4)[flags & 3] + field
    content = int.from_bytes(head[place - field : place], "little") + 256 * (field == 2)
    window = content if single else (8 + head[5] % 8) << 7 + head[5] // 8
    check(at, zstd_header=size > 4 and size >= place and not flags & 24, zstd_size_absent=field)
    check(at, zstd_size_mismatch=content == raw_size, zstd_dictionary=not flags & 3)
    check(at, zstd_checksum_missing=flags & 4, zstd_window=window <= 1 << 23)
    last = blocks = 0
    while not last:
        block, blocks = int.from_bytes(data[place : place + 3], "little"), blocks + 1
        last, kind, length = block & 1, block >> 1 & 3, block >> 3
        check(at + place, zstd_truncated=place + 3 <= size, zstd_block=kind < 3 and length <= min(window, 1 << 17))
        check(at + place, zstd_blocks=blocks <= 16 + size // 64)
        place += 3 + (1 if kind == 1 else length)
    check(at + place, zstd_truncated=place + 4 <= size, zstd_trailing=place + 4 == size)
    return place


def decode(f, r):
    """Return the decoded bytes of a record or an ancillary section, None where Python has no zstd."""
    data = f.data[r.offset : r.offset + r.stored]
    if r.codec == 0:
        return data
    end = frame(data, r.offset, r.raw)
    if zstd is None:
        f.skipped = True
        return None
    coded, decoder = bytearray(data[:end]), zstd.ZstdDecompressor()
    coded[4] &= ~4  # as if it had no checksum: so a wrong checksum is told from damaged blocks
    try:
        raw = decoder.decompress(coded, r.raw + 1)
    except zstd.ZstdError:
        raise Bad("zstd-corrupt", r.offset) from None
    check(r.offset, zstd_corrupt=decoder.eof and len(raw) == r.raw)
    check(r.offset, zstd_checksum=xxh64(raw) & 0xFFFFFFFF == int.from_bytes(data[end:], "little"))
    return memoryview(raw)


def number(bits, dtype):
    """Return the number that the bits of a float stand for; bf16 is the upper half of f32."""
    packed = struct.pack("<I", bits << 16) if dtype == 3 else struct.pack("<I" if dtype == 1 else "<H", bits)
    return struct.unpack("<" + LETTERS[dtype], packed)[0]


def payload(f, r):
    """Check a record and its tensors (15); return the decoded bytes, None where Python has no zstd."""
    check(r.offset, record_digest=xxh64(f.data[r.offset : r.offset + r.stored]) == r.digest)
    raw, end = decode(f, r), 0
    if raw is None:
        return None
    for start, size in (part for t in r.tensors.values() for part in t.parts if part[1]):
        check(r.offset + end, padding_nonzero=not any(raw[end:start]))
        end = start + size
    for t in r.tensors.values():
        parts = [raw[start : start + size] for start, size in t.parts]
        if t.mode == 1:
            form, mask = ("<I", 0x7FFFFFFF) if t.dtype == 1 else ("<H", 0x7FFF)
            scale, bias = (max(word & mask for (word,) in struct.iter_unpack(form, part)) for part in parts[1:])
            check(r.offset, scale_not_finite=scale < INFINITY[t.dtype], bias_not_finite=bias < INFINITY[t.dtype])
            top = number(scale, t.dtype) * ((1 << t.bits) - 1) + number(bias, t.dtype)
            check(r.offset, value_overflow=top <= number(INFINITY[t.dtype] - 1, t.dtype))
        elif t.mode:
            rules = {code: not any(x in parts[part] for x in wrong) for part, code, wrong in NANS[t.mode]}
            check(r.offset, **rules, value_overflow=max(parts[1]) <= TOP_SCALE[t.mode][t.dtype])
    return raw


def verify(f):
    """Check payload and appendices; return the verdict."""
    end, f.skipped, sections = f.head_size, False, f.lists["section"]
    for kind in ("file", "tensor", "expert"):
        for r in f.lists[kind].values():
            check(end, padding_nonzero=not any(f.data[end : r.offset]))
            payload(f, r)
            end = r.offset + r.stored
    if "SHRD" in sections:
        check(end, padding_nonzero=not any(f.data[end : sections["SHRD"].end]))
        end = sections["SHRD"].end
    for s in sections.values():
        if not s.flags:
            check(end, padding_nonzero=not any(f.data[end : s.offset]))
            check(s.offset, section_digest=xxh64(f.data[s.offset : s.end]) == s.digest)
            raw, end = decode(f, s), s.end
            if raw is not None and s.name in KINDS:
                appendix(f, KINDS[s.name], lines(raw, s.offset), s.offset)
    drafts = [t for t in f.lists["tensor"].values() if t.role == 9]
    check(256, draft_tensors="DRFT" in sections or not drafts)
    return "valid" + " (zstd records skipped)" * f.skipped


def lines(raw, at):
    """Yield the documents of an appendix."""
    start = 0
    while start < len(raw):
        stop = next((i for i in range(start, min(start + (1 << 21) + 1, len(raw))) if raw[i] == 10), -1)
        check(at, appendix_line=stop >= 0)
        yield document(raw[start:stop], at)
        start = stop + 1


def appendix(f, kind, documents, at):
    """Check an appendix (17), line by line."""
    head, modules = next(documents), iter(f.lists["layer"].values())
    check(at, appendix_header=has(head, {"appendix": "string", "version": "count"}) and head["appendix"] == kind)
    if head["version"] != 1:
        for _ in documents:
            pass
        return
    check(at, **{kind + "_type": has(head, HEADERS[kind])})
    if kind == "draft":
        draft(f, head, at)
    for line in documents:
        m = next(modules, None)
        check(at, **{kind + "_layers": kind == "draft" or m})
        check(at, **{kind + "_type": kind in LINES and has(line, LINES[kind])})
        values = line["counts" if kind == "profile" else "experts"]
        sizes = {len(values), len(line.get("gate_mass", values))}
        check(at, **{kind + "_layers": line["layer"] == m.layer and sizes == {m.count}})
        if kind == "profile":
            profile(head, line, at)
        else:
            records = [f.lists["expert"][f"{m.layer} {x}"] for x in range(m.count)]
            for facts, r in zip(values, records, strict=True):
                sparsity(facts, line["width"], r, at)
    check(at, **{kind + "_layers": kind == "draft" or next(modules, None) is None})


def draft(f, head, at):
    """Check the header of a draft head."""
    layers, config = head["source_layers"], f.metadata["model"]["config"]
    hidden, most = config.get("hidden_size"), config.get("num_hidden_layers")
    tensors = [t for t in f.lists["tensor"].values() if t.role == 9]
    ascending = layers and layers[0] >= 0 and all(a < b for a, b in pairwise(layers))
    check(at, draft_hidden=type(hidden) is not int or hidden == head["hidden"])
    check(at, draft_source_layer=ascending and (type(most) is not int or layers[-1] < most))
    check(at, draft_tensors=[x["name"] for x in head["tensors"]] == [t.name for t in tensors])
    check(at, draft_digest=[x["digest"] for x in head["tensors"]] == [f"{t.digest:016x}" for t in tensors])


def profile(head, line, at):
    """Check a layer of a routing profile."""
    counts, pairs = line["counts"], line.get("coactivation", [])
    mass = zip(counts, line["gate_mass"], strict=True)
    check(at, profile_count=all(0 <= n <= head["tokens"] for n in counts))
    check(at, profile_mass=all(x >= 0 and (n or not x) for n, x in mass))
    ascending = all(a[:2] < b[:2] for a, b in pairwise(pairs))
    fair = all(0 <= a < b < len(counts) and 1 <= n <= min(counts[a], counts[b]) for a, b, n in pairs)
    check(at, profile_coactivation=ascending and fair)


def sparsity(facts, width, r, at):
    """Check what sparsity says of an expert."""
    edges, bars, count = facts["boundaries"], facts["histogram"], facts["clusters"]
    ups = [t for name, t in r.tensors.items() if name in ("up_proj.weight", "fc1.weight")]
    whole = len(edges) == count + 1 and edges[:1] == [0] and edges[-1] == width
    check(at, sparsity_width=all(t.shape[0] == width for t in ups), sparsity_clusters=1 <= count <= width)
    check(at, sparsity_boundaries=whole and all(a < b for a, b in pairwise(edges)))
    check(at, sparsity_histogram=len(bars) == count and all(0 <= x <= 1 for x in bars))
    check(at, sparsity_digest=facts["digest"] == f"{r.digest:016x}")
