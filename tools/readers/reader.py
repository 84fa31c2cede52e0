#!/usr/bin/env python3
"""Reads and checks .squizd files as spec/squizd.md says, with nothing but the standard library.

Usage: reader.py list FILE | verify FILE... | tensor FILE NAME | expert FILE LAYER EXPERT
Exit code: 0 valid, 1 invalid, 2 cannot read. Numbers in parentheses are sections of the specification. What it says of
zstd frames, values and appendices is in deep.py, which is used if it is there. Modes and dtypes are in section 9."""

import importlib.util
import os
import re
import struct
import sys
from ctypes import c_float
from itertools import accumulate, islice, product
from json import loads
from math import isfinite, ldexp, prod
from mmap import ACCESS_READ, mmap
from types import SimpleNamespace

# Tables: fields with their types in the module struct; of an index also the size of an entry and the limit.
HEADER = """magic:8s major:H minor:H size:I required:Q optional:Q file_size:Q directory:Q count:I entry_size:I
directory_digest:Q flags:I alignment:I head_size:Q reserved:168s digest:Q"""
SECTION = "type:4s flags:I offset:Q stored:Q raw:Q codec:H reserved0:6s digest:Q reserved1:16s"
RECORD, NAME = " offset:Q stored:Q raw:Q codec:H layout:H reserved:4s digest:Q", "name_offset:I name_length:H "
TENSOR = NAME + "role:H mode:B dtype:B bits:B ndim:B group:I shape:32s parts:48s"
INDEXES = {"FILE": (NAME + "zero:2s" + RECORD, 48, 1 << 8), "TENS": (TENSOR + " zero:0s" + RECORD, 136, 1 << 14)}
INDEXES |= {"LAYT": ("first:I count:I raw:Q", 16, 1 << 10), "EXPI": ("layer:I expert:I zero:0s" + RECORD, 48, 1 << 17)}
INDEXES |= {"MOEL": ("layer:I count:I " + NAME + "zero:2s", 16, 1 << 12)}
ORDER = ["META", "STRS", "FILE", "TENS", "LAYT", "MOEL", "EXPI", "BNDL", "RESD", "SHRD"]  # seven of the head, data
KNOWN, SURROGATE = [*ORDER, "PROF", "SPRS", "DRFT", "ASTC", "ANEC"], "[\ud800-\udfff]"
SHOWN = "name layer expert count mode dtype bits group shape layout offset stored raw codec"
ABSENT = SimpleNamespace(at=0, offset=0, end=0, rows=(), more=0)
ENCODINGS = {*product([1], [2, 3, 4, 5, 6, 8], [32, 64, 128]), (0, 0, 0), (2, 4, 32), (3, 8, 32), (4, 4, 16)}
WIDTHS, LETTERS = (0, 4, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8), "-fefBbHhIiQq"  # of a dtype: bytes, type in the module struct
E2M1 = [sign * x for sign in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E4M3 = [(-1.0 if c & 128 else 1.0) * ldexp((c & 7) + 8 * (c & 120 > 0), max(c >> 3 & 15, 1) - 10) for c in range(256)]
RANKS, CONTROL = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "fc1": 0, "fc2": 1}, "[\0-\x1f\x7f-\x9f]"
BARE, TEXT, HASH, COUNT = r"(?a:\w([\w.-]{0,126}[\w-])?)", "(?s:.*)", "[0-9a-f]{64}", range(1 << 53)
SOURCE = {"repo?": TEXT, "revision?": TEXT, "files?": [{"name": TEXT, "size": COUNT, "sha256": HASH}]}
ORIGIN = {"tool?": TEXT, "version?": TEXT, "source?": SOURCE, "calibration?": {"sha256?": HASH}}
METADATA = {"model": {"config": {"model_type": TEXT}}, "recipe": {"name?": TEXT, "quantizer?": TEXT}}
METADATA |= {"provenance": ORIGIN, "licence?": TEXT, "description?": TEXT, "set?": {"index": COUNT, "count": COUNT}}
METADATA |= {"siblings?": [{"name": TEXT, "size": COUNT, "file_id": HASH}]}


class Bad(Exception): ...  # the first broken rule, and where the thing starts that breaks it


def check(place, **rules):  # place: an offset or an entry; rules: error codes (20), and whether the rule holds
    for code, holds in rules.items():
        if not holds:
            raise Bad(code.replace("_", "-"), getattr(place, "at", place))


def align(x, unit=64):
    return -(-x // unit) * unit


def xxh64(data):  # with seed 0
    def turn(x, bits):
        return (x << bits | (x & m) >> 64 - bits) & m

    p, q, r, s, t = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
    m, blocks, words, fours, lanes = (1 << 64) - 1, len(data) & ~31, len(data) & ~7, len(data) & ~3, [p + q, q, 0, -p]
    for block in struct.iter_unpack("<4Q", data[:blocks]):
        lanes = [turn(lane + word * q, 31) * p & m for lane, word in zip(lanes, block, strict=True)]
    h = sum(map(turn, lanes, (1, 7, 12, 18))) if blocks else t
    for lane in lanes if blocks else ():
        h = (h ^ turn(lane * q, 31) * p) * p + s
    h += len(data)
    for (word,) in struct.iter_unpack("<Q", data[blocks:words]):
        h = turn(h ^ turn(word * q, 31) * p, 27) * p + s
    for (word,) in struct.iter_unpack("<I", data[words:fours]):
        h = turn(h ^ word * p, 23) * q + r
    for byte in data[fours:]:
        h = turn(h ^ byte * t, 11) * p
    for shift, factor in ((33, q), (29, r), (32, 1)):
        h = (h & m ^ (h & m) >> shift) * factor
    return h & m


def document(data, at):  # parse restricted JSON (6)
    text, objects = str(data, "utf-8", "surrogateescape"), []
    outside = re.sub('"[^"]*"?', " ", re.sub(r'\\[\\"]', "", text))
    depth = max(accumulate(1 if c in "[{" else -1 for c in outside if c in "[]{}"), default=0)
    check(at, json_utf8=text[:1] != "\ufeff" and not re.search(SURROGATE, text))
    check(at, json_tokens=sum(map(outside.count, ",[{")) <= 1 << 17, json_depth=depth <= 32)
    hooks = {"parse_int": lambda x: int(x[:18]), "parse_constant": int}  # int("NaN") is a ValueError
    try:
        value = loads(text, object_pairs_hook=lambda pairs: objects.append(pairs) or dict(pairs), **hooks)
    except ValueError:
        raise Bad("json-syntax", at) from None
    for x in re.findall("-?[0-9][-+.0-9Ee]*", outside):
        check(at, json_number=isfinite(float(x)) if re.search("[.Ee]", x) else len(x) < 18 and abs(int(x)) < 1 << 53)
    check(at, json_duplicate_key=all(len(dict(pairs)) == len(pairs) for pairs in objects))
    bad = r"\\u(0000|d[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..\\u)d[c-f])"  # U+0000, surrogates without the other
    check(at, json_string=not re.search(bad, text.replace(r"\\", "-"), re.IGNORECASE))
    return value


def fits(value, kind):  # does it match a schema? Strings are patterns, a question mark follows optional members
    if isinstance(kind, dict):
        there = isinstance(value, dict) and all(key[-1] == "?" or key in value for key in kind)
        return there and all(fits(value[k], v) for key, v in kind.items() if (k := key.rstrip("?")) in value)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, str):
        return isinstance(value, str) and re.fullmatch(kind, value)
    return type(value) is int and value in kind


def dequantize(t, raw):  # the values of a tensor (14), from the decoded bytes of its record
    def numbers(data):  # bf16 is the upper half of f32
        data = data if t.dtype != 3 else b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        return [number for (number,) in struct.iter_unpack("<" + LETTERS[t.dtype], data)]

    codes, scales, biases = (raw[offset : offset + size] for offset, size in t.parts)
    if t.mode == 0:
        return numbers(codes)
    bits = ((i >> 3, i & 7) for i in range(0, prod(t.shape) * t.bits, t.bits))  # where a code starts: byte, bit
    q = [int.from_bytes(codes[byte : byte + 2], "little") >> bit & (1 << t.bits) - 1 for byte, bit in bits]
    if t.mode == 1:
        s, b = ([x for x in numbers(part) for _ in range(t.group)] for part in (scales, biases))
        return [c_float(c_float(s * q).value + b).value for s, q, b in zip(s, q, b, strict=True)]
    scales = [E4M3[x] if t.mode == 4 else ldexp(1, x - 127) for x in scales]
    return [(E4M3 if t.mode == 3 else E2M1)[x] * scales[i // t.group] for i, x in enumerate(q)]


def read(path):  # what a file holds, after all structural checks in the order of section 21
    def rows(table, start, stop):  # the entries of a table in [start, stop), their names (5) checked
        nonlocal names_end
        fields, types = zip(*(field.split(":") for field in table.split()), strict=True)
        form = "<" + "".join(types)
        for at in range(start, stop, struct.calcsize(form)):
            e = SimpleNamespace(**dict(zip(fields, struct.unpack_from(form, data, at), strict=True)), at=at)
            if "name_length" in fields:
                key = first, last = e.name_offset, e.name_offset + e.name_length
                check(e, name_length=0 < e.name_length <= 512, name_range=last <= strs.stored)
                check(e, name_place=key in names or first == names_end)
                e.name = names[key] = str(data[strs.offset :][first:last], "utf-8", "surrogateescape")
                names_end = max(names_end, last)
                check(e, name_utf8=not re.search(SURROGATE, e.name), name_control=not re.search(CONTROL, e.name))
            yield e

    def describe(t, end, roles):  # check a tensor (9) that follows another in its record; return where it ends
        shape, t.parts = struct.unpack("<4Q", t.shape), [*struct.iter_unpack("<2Q", t.parts)]
        t.shape, n = [*shape[: t.ndim]], prod(shape[: t.ndim])
        legal = (t.mode, t.bits, t.group) in ENCODINGS and (t.dtype < 4 or t.mode == 0)
        check(t, tensor_role=t.role in roles, tensor_mode=t.mode < 5, tensor_dtype=0 < t.dtype < 12)
        check(t, tensor_encoding=legal, tensor_dims=0 < t.ndim <= 4, tensor_unused_dim=not any(shape[t.ndim :]))
        check(t, tensor_zero_dim=n, tensor_overflow=n <= 1 << 48, row_not_divisible=t.shape[-1] % (t.group or 1) == 0)
        scales = n // t.group * (WIDTHS[t.dtype] if t.mode == 1 else 1) if t.mode else 0
        sizes = n * t.bits // 8 if t.mode else n * WIDTHS[t.dtype], scales, scales if t.mode == 1 else 0
        for (at, size), right in zip(t.parts, sizes, strict=True):
            check(t, part_size=size == right, part_range=at + size <= 1 << 36, part_offset=at == (size and align(end)))
            end = at + size or end
        return end

    def record(e, start, sizes):  # check a record (10), given the raw sizes of layouts; return where it ends
        check(e, record_offset=e.offset == start, record_codec=e.codec < 2, record_limit=e.stored <= 1 << 36 >= e.raw)
        check(e, record_empty=e.stored and e.raw, record_size=e.codec or e.stored == e.raw)
        check(e, record_ratio=not e.codec or e.raw <= 64 * e.stored, record_layout=e.layout < len(sizes))
        check(e, index_reserved=not any(e.reserved + e.zero), record_raw_size=e.raw == sizes[e.layout])
        return e.offset + e.stored

    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
        raise OSError("not a regular file")
    check(0, file_empty=(size := os.path.getsize(path)))
    with open(path, "rb") as file:
        data = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
    sections, files, tensors, modules, experts, names, names_end = {}, {}, {}, {}, {}, {}, 0
    check(0, bad_magic=data[:4] == b"SQZD"[:size], file_short=size >= 256)  # header (3)
    h = next(rows(HEADER, 0, 256))
    check(0, text_mode_damage=h.magic[4:] == b"\r\n\x1a\n", version_zero=h.major, version_byte_swapped=h.major != 256)
    start = 256 + 64 * h.count
    check(0, version_future=h.major == 1, header_digest=xxh64(data[:248]) == h.digest, header_size=h.size == 256)
    check(0, unknown_required_feature=not h.required, file_truncated=size >= h.file_size)
    check(0, trailing_bytes=size == h.file_size, directory_offset=h.directory == 256, section_count=0 < h.count <= 64)
    check(0, directory_entry_size=h.entry_size == 64, record_alignment=h.alignment in [1 << i for i in range(6, 25)])
    check(0, head_limit=h.head_size <= min(1 << 24, size), directory_range=start <= h.head_size)
    check(0, header_reserved=not any(h.reserved), directory_digest=xxh64(data[256:start]) == h.directory_digest)
    for s in rows(SECTION, 256, start):  # directory (4)
        s.name, s.end, largest = s.type.decode("latin-1"), s.offset + s.stored, max(s.stored, s.raw)
        own, top = s.name in ORDER, 1 << (21 if s.name in ORDER[:2] else 64 if s.name in ORDER else 36)
        check(s, section_type=re.fullmatch("[A-Za-z0-9]{4}", s.name), section_flags=s.flags < 2)
        check(s, section_critical_flag=s.flags == own or s.name not in KNOWN, section_unknown_critical=own >= s.flags)
        check(s, section_empty=s.stored and s.raw, section_codec=s.codec < 2 - own, section_limit=largest <= top)
        check(s, section_size=s.codec or s.stored == s.raw, section_ratio=not s.codec or s.raw <= 64 * s.stored)
        check(s, section_reserved=not any(s.reserved0 + s.reserved1))
        check(s, data_section_digest=not s.digest or s.name not in ORDER[7:], section_duplicate=s.name not in sections)
        sections[s.name], rank = s, 0
    check(256, section_missing={"META", "STRS", "TENS", "RESD"} <= sections.keys())
    for group in ({"LAYT", "MOEL", "EXPI", "SHRD"}, {"FILE", "BNDL"}):
        check(256, section_incomplete_set=len(group & sections.keys()) in (0, len(group)))
    for end, s in zip([start, *(s.end for s in sections.values())], sections.values(), strict=False):
        unit, least, rank = h.alignment if s.name == "SHRD" else 64, rank, [*ORDER, s.name].index(s.name)
        check(s, section_order=rank >= least, section_wraps=s.end < 1 << 64, section_over_header=s.offset >= start)
        check(s, section_overlap=s.offset >= end, section_unaligned=s.offset % unit == 0)
        check(s, section_gap=s.offset == align(end, unit), section_range=s.end <= size)
    head = meta, strs, *indexes = [s for s in sections.values() if s.name in ORDER[:7]]
    check(0, section_gap=s.end == size, head_size=h.head_size == head[-1].end)
    for end, s in zip([start] + [s.end for s in head], head, strict=False):  # head
        check(end, padding_nonzero=not any(data[end : s.offset]))
        check(s, section_digest=xxh64(data[s.offset : s.end]) == s.digest)
    for s in indexes:  # index sizes
        (fields, step, most), extra = INDEXES[s.name], 8 if s.name == "LAYT" else 0
        count, s.more = struct.unpack_from("<2I", data, s.offset) if extra else (s.stored // step, 0)
        stop = s.offset + extra + step * count
        s.rows, s.tensors = rows(fields, s.offset + extra, stop), rows(TENSOR, stop, s.end)
        check(s, index_size=s.end == stop + 96 * s.more, index_count=count <= most and s.more <= 1 << 13)
    metadata = document(data[meta.offset : meta.end], meta)  # metadata (7)
    check(meta, metadata_type=fits(metadata, METADATA))
    member, siblings = metadata.get("set", {"index": 0, "count": 1}), [x["name"] for x in metadata.get("siblings", [])]
    check(meta, sibling_name=all(re.fullmatch(BARE, sibling) for sibling in siblings))
    wanted, single = 0 if member["index"] else member["count"] - 1, {sibling.lower() for sibling in siblings}
    check(meta, metadata_set=member["index"] < member["count"] and len(siblings) == len(single) == wanted)
    file, tens, layt, moel, expi, bndl, resd, shrd = (sections.get(kind, ABSENT) for kind in ORDER[2:])
    for index, found, target, end in ((file, files, bndl, bndl.offset), (tens, tensors, resd, resd.offset)):
        for e in index.rows:
            key, e.tensors = (e.name.lower(), {}) if index is file else (e.name, {e.name: e})
            check(e, file_name=index is tens or re.fullmatch(BARE, e.name))
            raw = describe(e, 0, [0, 1, 2, 3, 4, 6, 7, 8, 9]) if index is tens else e.raw
            check(e, name_duplicate=key not in found)
            found[key], end = e, record(e, align(end), [raw])
        check(index, record_range=end == target.end)
    layouts, taken, last, before = [*layt.rows], 0, -1, (-1, -1)
    for layout in layouts:  # what an expert consists of (12)
        check(layout, layout_range=layout.first == taken <= layt.more - layout.count, layout_empty=layout.count)
        taken, end, rank, layout.tensors = taken + layout.count, 0, (0, False), {}
        for t in islice(layt.tensors, layout.count):
            end, (module, _, rest) = describe(t, end, [5]), t.name.partition(".")
            least, rank = rank, (RANKS[module], rest != "weight") if module in RANKS else rank
            check(t, name_duplicate=t.name not in layout.tensors, layout_order=rank >= least)
            layout.tensors[t.name] = t
        check(layout, layout_raw_size=layout.raw == end)
    check(layt, layout_range=taken == layt.more)
    for m in moel.rows:  # modules of experts (12)
        check(m, name_duplicate=m.name not in modules, index_reserved=not any(m.zero))
        check(m, moe_layer_unsorted=m.layer > last, moe_layer_experts=m.count)
        modules[m.name], last = m, m.layer
    above = (accumulate(name.split(".")[:-1], "{}.{}".format) for name in [*tensors, *modules])
    check(strs, name_inside_experts=all(map(modules.keys().isdisjoint, above)), name_fill=names_end == strs.stored)
    counts, end, sizes = {m.layer: m.count for m in modules.values()}, shrd.offset, [layout.raw for layout in layouts]
    for e in expi.rows:  # experts (12)
        key, place = f"{e.layer} {e.expert}", (e.layer, e.expert)
        check(e, expert_layer=e.layer in counts, expert_range=e.expert < counts.get(e.layer, 0))
        check(e, expert_duplicate=key not in experts, expert_unsorted=place > before)
        experts[key], before = e, place
    check(expi, expert_missing=len(experts) == sum(counts.values()))
    for e in experts.values():
        end = align(record(e, end, sizes), h.alignment)
        e.tensors = layouts[e.layout].tensors
    check(shrd, record_range=end == shrd.end)
    kinds = {(t.mode, t.bits) for x in [*tensors.values(), *layouts] for t in x.tensors.values()} | sections.keys()
    flags = enumerate(["ASTC", "", (1, 4), (1, 3), (1, 2), "SPRS", "ANEC", "DRFT", (2, 4)])
    check(64, content_flags=h.flags == sum(1 << bit for bit, kind in flags if kind in kinds))
    lists = {"section": sections, "file": files, "tensor": tensors, "layer": modules, "expert": experts}
    return SimpleNamespace(data=data, head_size=h.head_size, metadata=metadata, lists=lists)


def payload(f, r):  # check the digest of a record; return its bytes, or None if they are coded
    data = f.data[r.offset : r.offset + r.stored]
    check(r.offset, record_digest=xxh64(data) == r.digest)
    return data if r.codec == 0 else None


def run(command, path, *rest):  # carry out a command for a file; return the exit code
    try:
        f = read(path)
        if command == "verify":
            for r in () if deep else [r for kind in ("file", "tensor", "expert") for r in f.lists[kind].values()]:
                payload(f, r)
            print(f"{path}: {deep.verify(f) if deep else 'valid (structure and digests)'}")
        elif f.metadata.get("set", {"count": 1})["count"] > 1:
            print("note: one file of a set, the others are not read", file=sys.stderr)
        for kind, e in [(x, e) for x in f.lists for e in f.lists[x].values()] if command == "list" else ():
            print(kind, *(f"{key}={vars(e)[key]!a}" for key in SHOWN.split() if key in vars(e)))
        if rest:
            raw = (r := f.lists[command].get(" ".join(rest))) and (deep or sys.modules[__name__]).payload(f, r)
            if raw is None:
                raise OSError(f"no such {command}" if r is None else "zstd needs deep.py, and Python 3.14")
            for t in r.tensors.values():
                print(f"{t.name!a} {t.shape}", *(x if t.dtype > 3 else x.hex() for x in dequantize(t, raw)), sep="\n")
    except Bad as bad:
        print(f"{path}: invalid", *bad.args, file=sys.stdout if command == "verify" else sys.stderr)
        return 1
    except (OSError, MemoryError) as error:
        print(f"{path}: cannot read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.modules["reader"] = sys.modules["__main__"]  # what deep.py imports
    deep = importlib.import_module("deep") if importlib.util.find_spec("deep") else None
    sys.stdout.reconfigure(errors="backslashreplace")
    command, *arguments = sys.argv[1:] or [""]
    if len(arguments) != {"list": 1, "tensor": 2, "expert": 3, "verify": len(arguments) or 1}.get(command):
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    sys.exit(max(run(command, *call) for call in (zip(arguments) if command == "verify" else [arguments])))
