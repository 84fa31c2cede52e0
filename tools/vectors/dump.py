"""The annotated hexadecimal dump of a small file that `spec/squizd.md` shows."""

from __future__ import annotations

import struct

HEADER_FIELDS = [
    ("magic", 8), ("major", 2), ("minor", 2), ("header_size", 4), ("required_features", 8), ("optional_features", 8),
    ("file_size", 8), ("directory_offset", 8), ("directory_count", 4), ("directory_entry_size", 4),
    ("directory_digest", 8), ("content_flags", 4), ("record_alignment", 4), ("head_size", 8), ("reserved", 168),
    ("header_digest", 8),
]  # fmt: skip
ENTRY_FIELDS = [
    ("type", 4), ("flags", 4), ("offset", 8), ("stored_size", 8), ("raw_size", 8), ("codec", 2), ("reserved", 6),
    ("digest", 8), ("reserved", 16),
]  # fmt: skip
TENSOR_FIELDS = [
    ("name_offset", 4), ("name_length", 2), ("role", 2), ("mode", 1), ("dtype", 1), ("bits", 1), ("ndim", 1),
    ("group_size", 4), ("shape", 32), ("codes_offset", 8), ("codes_size", 8), ("scales_offset", 8),
    ("scales_size", 8), ("biases_offset", 8), ("biases_size", 8),
]  # fmt: skip
RECORD_FIELDS = [
    ("offset", 8), ("stored_size", 8), ("raw_size", 8), ("codec", 2), ("layout", 2), ("reserved", 4), ("digest", 8),
]  # fmt: skip
OPAQUE = ("magic", "reserved", "shape", "type", "digest", "directory_digest", "header_digest")


class Dump:
    """Collects the lines of one file from its start to its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.lines = data, 0, list[str]()

    def rows(self, size: int, comment: str) -> None:
        """The next bytes, at most 16 a line, with a comment on the first."""
        end = self.at + size
        repeated = size > 32 and len(set(self.data[self.at : end])) == 1
        while self.at < end:
            row = self.data[self.at : min(self.at + 16, end)]
            self.lines.append(f"{self.at:06x}  {row.hex(' '):<47}  {comment}".rstrip())
            self.at += len(row)
            comment = ""
            if repeated and self.at < end:
                self.lines.append(f"        ... {end - self.at} more bytes {row[:1].hex()}")
                self.at = end

    def fields(self, fields: list[tuple[str, int]], prefix: str = "") -> None:
        """The next bytes field by field."""
        for name, size in fields:
            value = int.from_bytes(self.data[self.at : self.at + size], "little")
            shown = "" if name in OPAQUE else f" {value:#x}" if name == "content_flags" else f" {value}"
            if name in ("type", "shape"):
                raw = self.data[self.at : self.at + size]
                shown = f" {raw.decode()}" if name == "type" else f" {list(struct.unpack('<4Q', raw))}"
            self.rows(size, f"{prefix}{name}{shown}")

    def padding(self, target: int) -> None:
        """Zero bytes up to `target`."""
        if target > self.at:
            self.rows(target - self.at, "padding")


def dump(data: bytes) -> str:
    """The head of the file field by field, and its payload record by record."""
    out = Dump(data)
    out.fields(HEADER_FIELDS)
    spans = {}
    count = int.from_bytes(data[48:52], "little")
    for i in range(count):
        kind, _, offset, size = struct.unpack_from("<4sIQQ", data, out.at)
        spans[kind.decode()] = offset, size
        if i == 0:
            out.fields(ENTRY_FIELDS, f"directory[{i}].")
        else:
            out.rows(64, f"directory[{i}]: {kind.decode()}, {size} bytes at {offset:#x}")
    for kind in ("META", "STRS", "FILE", "TENS", "LAYT", "MOEL", "EXPI"):
        out.padding(spans[kind][0])
        _section(out, kind, spans[kind][1])
    _payload(out, spans)
    out.padding(len(data))
    return "\n".join(out.lines) + "\n"


def _section(out: Dump, kind: str, size: int) -> None:
    end = out.at + size
    if kind in ("META", "STRS"):
        out.rows(size, f"{kind}: {'restricted JSON' if kind == 'META' else 'names'}")
    elif kind == "FILE":
        out.fields([("name_offset", 4), ("name_length", 2), ("reserved", 2), *RECORD_FIELDS], "FILE[0].")
    elif kind == "TENS":
        out.fields([*TENSOR_FIELDS, *RECORD_FIELDS], "TENS[0].")
        out.rows(end - out.at, "TENS[1]")
    elif kind == "LAYT":
        out.fields([("layout_count", 4), ("tensor_count", 4)], "LAYT: ")
        out.fields([("first_tensor", 4), ("tensor_count", 4), ("raw_size", 8)], "layout 0: ")
        for i, name in enumerate(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
            out.rows(96, f"tensor {i}: {name}")
    elif kind == "MOEL":
        for i in range(size // 16):
            fields = [("layer", 4), ("expert_count", 4), ("name_offset", 4), ("name_length", 2), ("reserved", 2)]
            out.fields(fields, f"MOEL[{i}].")
    else:
        out.fields([("layer", 4), ("expert", 4), *RECORD_FIELDS], "EXPI[0].")
        for i in range(1, size // 48):
            layer, expert, offset = struct.unpack_from("<IIQ", out.data, out.at)
            out.rows(48, f"EXPI[{i}]: layer {layer}, expert {expert}, at {offset:#x}")


def _payload(out: Dump, spans: dict[str, tuple[int, int]]) -> None:
    out.padding(spans["BNDL"][0])
    out.rows(spans["BNDL"][1], "BNDL: tokenizer.json")
    out.padding(spans["RESD"][0])
    out.rows(64, "RESD: model.embed_tokens.weight, codes (8 bits: a byte each)")
    out.rows(8, "scales, f32: one for each row")
    out.padding(spans["RESD"][0] + 128)
    out.rows(8, "biases, f32")
    out.padding(spans["RESD"][0] + 192)
    out.rows(8, "model.norm.weight, f32: 1.0, -0.5")
    out.padding(spans["SHRD"][0])
    expert, count = out.at, spans["SHRD"][1] // 512
    for name, start in (("gate_proj", 0), ("up_proj", 192)):
        out.padding(expert + start)
        out.rows(
            32, f"{'SHRD: layer 0, expert 0: ' if start == 0 else ''}{name}.weight, codes (4 bits, low nibble first)"
        )
        out.padding(expert + start + 64)
        out.rows(4, "scales, bf16")
        out.padding(expert + start + 128)
        out.rows(4, "biases, bf16")
    out.padding(expert + 384)
    out.rows(128, "down_proj.weight, f16")
    left = (count - 1) * 512
    out.lines.append(f"        ... {left} more bytes: {count - 1} expert records of 512 bytes")
    out.at += left
