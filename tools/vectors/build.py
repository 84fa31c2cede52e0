"""Lay out a file from parts, and seal it: every number stays open to change in between.

`Spec` says what a file holds, `lay_out` turns it into a `Draft` of named fields, and `seal` packs the
draft, filling in every digest that is still None. A fault is a change to the spec, the draft, or the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import xxhash

SECTION = "<4sIQQQH6sQ16s"
HEADER = "<8sHHIQQQQIIQIIQ168s"
TENSOR = "<IHHBBBBI4Q6Q"
RECORD = "<QQQHHIQ"
ROLES = ["other", "embedding", "attention", "router", "shared", "expert", "norm", "head", "dense", "draft"]
MODES = ["raw", "affine", "mxfp4", "mxfp8", "nvfp4"]
DTYPES = ["", *["f32", "f16", "bf16", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"]]
FLAGS = {("affine", 4): 1 << 2, ("affine", 3): 1 << 3, ("affine", 2): 1 << 4, ("mxfp4", 4): 1 << 8}
SECTION_FLAGS = {"SPRS": 1 << 5, "DRFT": 1 << 7, "ASTC": 1 << 0, "ANEC": 1 << 6}
HEAD = ["META", "STRS", "FILE", "TENS", "LAYT", "MOEL", "EXPI"]

Row = dict[str, Any]


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass
class Tensor:
    """A tensor: what it is, its parts as stored, and what they decode to (floats, or integers)."""

    name: str
    role: str
    mode: str
    dtype: str
    bits: int
    group_size: int
    shape: tuple[int, ...]
    codes: bytes
    scales: bytes = b""
    biases: bytes = b""
    values: list[Any] = field(default_factory=list)


@dataclass
class Coded:
    """A zstd frame to store instead of the bytes that it decodes to."""

    frame: bytes


@dataclass
class Expert:
    """One expert: which layout it has, its tensors, and a frame if it is not stored raw."""

    layout: int
    tensors: list[Tensor]
    coded: Coded | None = None


@dataclass
class Appendix:
    """A section after the data sections. `flags` 1 makes it critical."""

    type: str
    content: bytes
    coded: Coded | None = None
    flags: int = 0


@dataclass
class Spec:
    """What a file holds."""

    metadata: bytes
    residents: list[tuple[Tensor, Coded | None]]
    files: list[tuple[str, bytes, Coded | None]] = field(default_factory=list)
    layouts: list[list[Tensor]] = field(default_factory=list)
    layers: list[tuple[int, str, list[Expert]]] = field(default_factory=list)
    appendices: list[Appendix] = field(default_factory=list)
    alignment: int = 64
    minor: int = 0
    optional_features: int = 0
    share_names: bool = True
    share_parts: bool = False  # a name that is a part of what STRS has so far is not stored again
    extra: dict[str, bytes] = field(default_factory=dict)  # bytes to append to a head section
    replaced: dict[str, bytes] = field(default_factory=dict)  # bytes in place of a head section


@dataclass
class Draft:
    """A file whose every field is still a number in a dict; digests are None until `seal`."""

    header: Row
    directory: list[Row]
    head: dict[str, Any]  # section -> bytes, or rows
    data: dict[int, bytes]  # place in the file -> bytes
    size: int = 0
    head_at: dict[str, int] = field(default_factory=dict)
    records: list[tuple[Row, int]] = field(default_factory=list)  # every record, and where its bytes lie
    extra: dict[str, bytes] = field(default_factory=dict)

    def section(self, kind: str) -> Row:
        """The directory entry of a section."""
        return next(e for e in self.directory if e["type"] == kind.encode())


class _Names:
    def __init__(self, share: bool, parts: bool) -> None:
        self.data, self.at, self.share, self.parts = bytearray(), dict[str, int](), share, parts

    def put(self, name: str) -> Row:
        raw = name.encode("utf-8", "surrogateescape")
        if self.parts and raw in self.data:
            return {"name_offset": self.data.index(raw), "name_length": len(raw)}
        if not self.share or name not in self.at:
            self.at[name] = len(self.data)
            self.data += raw
        return {"name_offset": self.at[name], "name_length": len(raw)}


def parts_of(tensor: Tensor, start: int) -> tuple[Row, bytes, int]:
    """Offsets and sizes of a tensor's parts from `start`, their bytes with padding before, and where they end."""
    row, out, end = {}, bytearray(), start
    for part in ("codes", "scales", "biases"):
        content = getattr(tensor, part)
        offset = align(end, 64) if content else 0
        row[f"{part}_offset"], row[f"{part}_size"] = offset, len(content)
        if content:
            out += bytes(offset - end) + content
            end = offset + len(content)
    return row, bytes(out), end


def tensor_row(tensor: Tensor, names: _Names, start: int) -> tuple[Row, int]:
    places, _, end = parts_of(tensor, start)
    row = names.put(tensor.name) | {
        "role": ROLES.index(tensor.role), "mode": MODES.index(tensor.mode), "dtype": DTYPES.index(tensor.dtype),
        "bits": tensor.bits, "ndim": len(tensor.shape), "group_size": tensor.group_size,
    }  # fmt: skip
    row |= {f"shape{i}": (*tensor.shape, 0, 0, 0, 0)[i] for i in range(4)}
    return row | places, end


def raw_record(tensors: list[Tensor]) -> bytes:
    """The decoded bytes of a record that holds these tensors."""
    out = b""
    for tensor in tensors:
        out += parts_of(tensor, len(out))[1]
    return out


def record_row(offset: int, raw: bytes, coded: Coded | None, layout: int = 0) -> tuple[Row, bytes]:
    stored = coded.frame if coded else raw
    row = {"offset": offset, "stored_size": len(stored), "raw_size": len(raw), "codec": int(coded is not None)}
    return row | {"layout": layout, "reserved": 0, "digest": None}, stored


def content_flags(spec: Spec) -> int:
    flags = 0
    for tensor in [t for t, _ in spec.residents] + [t for layout in spec.layouts for t in layout]:
        flags |= FLAGS.get((tensor.mode, tensor.bits), 0)
    for appendix in spec.appendices:
        flags |= SECTION_FLAGS.get(appendix.type, 0)
    return flags


def lay_out(spec: Spec) -> Draft:
    """Every field of the file that `spec` asks for."""
    names = _Names(spec.share_names, spec.share_parts)
    head: dict[str, Any] = {"META": spec.metadata, "STRS": b""}
    if spec.files:
        head["FILE"] = [names.put(name) | {"reserved": 0} for name, _, _ in spec.files]
    head["TENS"] = [tensor_row(t, names, 0)[0] for t, _ in spec.residents]
    if spec.layers:
        head["LAYT"] = _layouts(spec, names)
        head["MOEL"] = [
            {"layer": layer, "expert_count": len(experts)} | names.put(path) | {"reserved": 0}
            for layer, path, experts in spec.layers
        ]
        head["EXPI"] = [{"layer": layer, "expert": i} for layer, _, experts in spec.layers for i in range(len(experts))]
    head["STRS"] = bytes(names.data)
    head |= spec.replaced
    kinds = [*head, *(["BNDL"] if spec.files else []), "RESD", *(["SHRD"] if spec.layers else [])]
    header: Row = {
        "magic": b"SQZD\r\n\x1a\n", "major": 1, "minor": spec.minor, "header_size": 256, "required_features": 0,
        "optional_features": spec.optional_features, "file_size": 0, "directory_offset": 256,
        "directory_count": len(kinds) + len(spec.appendices), "directory_entry_size": 64, "directory_digest": None,
        "content_flags": content_flags(spec), "record_alignment": spec.alignment, "head_size": 0, "reserved": b"",
        "header_digest": None,
    }  # fmt: skip
    draft = Draft(header, [], head, {}, extra=spec.extra)
    end = 256 + 64 * header["directory_count"]
    for kind in head:
        start = align(end, 64)
        draft.head_at[kind] = start
        end = start + len(_pack(kind, head[kind])) + len(spec.extra.get(kind, b""))
        draft.directory.append(_entry(kind, start, end - start))
    header["head_size"] = end
    files = [(content, coded) for _, content, coded in spec.files]
    end = _records(draft, "BNDL", head.get("FILE", []), files, end)
    residents = [(raw_record([t]), coded) for t, coded in spec.residents]
    end = _records(draft, "RESD", head["TENS"], residents, end)
    if spec.layers:
        experts = [(raw_record(e.tensors), e.coded, e.layout) for _, _, some in spec.layers for e in some]
        end = _records(draft, "SHRD", head["EXPI"], experts, end, spec.alignment)
    for appendix in spec.appendices:
        start, stored = align(end, 64), appendix.coded.frame if appendix.coded else appendix.content
        draft.data[start], end = stored, start + len(stored)
        entry = _entry(appendix.type, start, len(stored), flags=appendix.flags)
        draft.directory.append(entry | {"raw_size": len(appendix.content), "codec": int(appendix.coded is not None)})
    header["file_size"] = draft.size = end
    return draft


def _layouts(spec: Spec, names: _Names) -> Row:
    layouts, tensors = [], []
    for some in spec.layouts:
        first, end = len(tensors), 0
        for tensor in some:
            row, end = tensor_row(tensor, names, end)
            tensors.append(row)
        layouts.append({"first_tensor": first, "tensor_count": len(some), "raw_size": end})
    return {"layout_count": len(layouts), "tensor_count": len(tensors), "layouts": layouts, "tensors": tensors}


def _records(
    draft: Draft, kind: str, rows: list[Row], contents: list[tuple[Any, ...]], end: int, alignment: int = 0
) -> int:
    """Place records one after another; `alignment` pads each to a multiple (SHRD)."""
    first = start = align(end, alignment or 64)
    for row, (raw, coded, *layout) in zip(rows, contents, strict=True):
        start = align(end, alignment or 64)
        record, stored = record_row(start, raw, coded, *layout)
        row["record"], draft.data[start] = record, stored
        draft.records.append((record, start))
        end = start + len(stored)
        if alignment:
            end = align(end, alignment)
    if rows:
        draft.directory.append(_entry(kind, first, end - first, data=True))
    return end


def _entry(kind: str, offset: int, size: int, flags: int = 1, data: bool = False) -> Row:
    return {
        "type": kind.encode(), "flags": flags, "offset": offset, "stored_size": size, "raw_size": size, "codec": 0,
        "reserved0": b"", "digest": 0 if data else None, "reserved1": b"",
    }  # fmt: skip


# -- bytes -----------------------------------------------------------------------------------------------


def _pack_record(row: Row) -> bytes:
    return struct.pack(RECORD, *row.values())


def _pack_tensor(row: Row) -> bytes:
    keys = [
        "name_offset",
        "name_length",
        "role",
        "mode",
        "dtype",
        "bits",
        "ndim",
        "group_size",
        "shape0",
        "shape1",
        "shape2",
        "shape3",
    ]
    keys += [f"{part}_{what}" for part in ("codes", "scales", "biases") for what in ("offset", "size")]
    return struct.pack(TENSOR, *(row[key] for key in keys))


_EMPTY = {"offset": 0, "stored_size": 0, "raw_size": 0, "codec": 0, "layout": 0, "reserved": 0, "digest": 0}


def _pack(kind: str, content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    if kind == "LAYT":
        out = struct.pack("<II", content["layout_count"], content["tensor_count"])
        out += b"".join(struct.pack("<IIQ", *row.values()) for row in content["layouts"])
        return out + b"".join(_pack_tensor(row) for row in content["tensors"])
    out = b""
    for row in content:
        if kind == "FILE":
            out += struct.pack("<IHH", row["name_offset"], row["name_length"], row["reserved"])
        elif kind == "TENS":
            out += _pack_tensor(row)
        elif kind == "MOEL":
            out += struct.pack(
                "<IIIHH", row["layer"], row["expert_count"], row["name_offset"], row["name_length"], row["reserved"]
            )
        elif kind == "EXPI":
            out += struct.pack("<II", row["layer"], row["expert"])
        if kind != "MOEL":
            out += _pack_record(row.get("record", _EMPTY))
    return out


def _digest(data: bytes) -> int:
    return int(xxhash.xxh64_intdigest(data, seed=0))


def seal(draft: Draft) -> bytes:
    """The file's bytes; every digest that is None is computed."""
    image = bytearray(draft.size)
    for at, content in draft.data.items():
        image[at : at + len(content)] = content
    for record, at in draft.records:
        if record["digest"] is None:
            record["digest"] = _digest(draft.data[at])
    for kind, at in draft.head_at.items():
        content = _pack(kind, draft.head[kind]) + draft.extra.get(kind, b"")
        image[at : at + len(content)] = content
    for entry in draft.directory:
        if entry["digest"] is None:
            entry["digest"] = _digest(bytes(image[entry["offset"] : entry["offset"] + entry["stored_size"]]))
    directory = b"".join(struct.pack(SECTION, *entry.values()) for entry in draft.directory)
    image[256 : 256 + len(directory)] = directory
    if draft.header["directory_digest"] is None:
        draft.header["directory_digest"] = _digest(directory)
    raw = struct.pack(HEADER, *list(draft.header.values())[:-1])
    stated = draft.header["header_digest"]
    image[:256] = raw + struct.pack("<Q", _digest(raw) if stated is None else stated)
    return bytes(image)
