"""The one mirror of `spec/squizd.md`: constants, registries, records and limits of format 1.0.

Knows how many bytes everything takes and where it lies. Knows nothing about files, hubs, models or
what the stored numbers mean (that is `squizd.codecs`). A test compares this module with the spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAGIC: Final = b"SQZD\r\n\x1a\n"
MAJOR: Final = 1
MINOR: Final = 0
HEADER_SIZE: Final = 256
DIRECTORY_ENTRY_SIZE: Final = 64
PART_ALIGNMENT: Final = 64  # sections, resident records and the parts of any record
DEFAULT_RECORD_ALIGNMENT: Final = 16384  # expert records, unless padding would cost too much

# Limits (spec, "Limits"). A reader rejects what exceeds them before it allocates anything. They are
# chosen so that no file makes a reader of this package use more than 64 MiB to open or to validate it.
MAX_SECTIONS: Final = 64
MAX_HEAD_SIZE: Final = 1 << 24
MAX_JSON_SIZE: Final = 1 << 21
MAX_JSON_TOKENS: Final = 1 << 17  # commas and opening brackets of one document
MAX_JSON_DEPTH: Final = 32
MAX_SAFE_INTEGER: Final = (1 << 53) - 1
MAX_NAMES_SIZE: Final = 1 << 21
MAX_NAME_LENGTH: Final = 512
MAX_FILE_NAME_LENGTH: Final = 128
MAX_DIMENSIONS: Final = 4
MAX_ELEMENTS: Final = 1 << 48
MAX_TENSORS: Final = 1 << 14  # entries of TENS
MAX_LAYOUTS: Final = 1 << 10
MAX_LAYOUT_TENSORS: Final = 1 << 13
MAX_MOE_LAYERS: Final = 1 << 12
MAX_EXPERT_RECORDS: Final = 1 << 17
MAX_FILES: Final = 256
MAX_RECORD_SIZE: Final = 1 << 36
MAX_RECORD_ALIGNMENT: Final = 1 << 24
MAX_ZSTD_WINDOW: Final = 1 << 23
MAX_ZSTD_RATIO: Final = 64  # raw_size / stored_size
ZSTD_BLOCK_SIZE: Final = 1 << 17  # RFC 8878: no block decodes to more

# Section types, four ASCII characters each.
META: Final = b"META"  # metadata, restricted JSON
STRS: Final = b"STRS"  # every name that the indexes refer to
FILE: Final = b"FILE"  # index of embedded files
TENS: Final = b"TENS"  # index of resident tensors
LAYT: Final = b"LAYT"  # shard layouts
MOEL: Final = b"MOEL"  # modules that hold experts
EXPI: Final = b"EXPI"  # index of expert records
BNDL: Final = b"BNDL"  # embedded files (tokenizer)
RESD: Final = b"RESD"  # resident tensors
SHRD: Final = b"SHRD"  # expert shards
PROF: Final = b"PROF"  # routing profile, JSON lines
SPRS: Final = b"SPRS"  # sparsity of experts, JSON lines
DRFT: Final = b"DRFT"  # draft head, JSON lines
ASTC: Final = b"ASTC"  # reserved
ANEC: Final = b"ANEC"  # reserved
HEAD_SECTIONS: Final = (META, STRS, FILE, TENS, LAYT, MOEL, EXPI)  # in this order
DATA_SECTIONS: Final = (BNDL, RESD, SHRD)  # in this order, after the head
CRITICAL_SECTIONS: Final = HEAD_SECTIONS + DATA_SECTIONS
REQUIRED_SECTIONS: Final = (META, STRS, TENS, RESD)
MOE_SECTIONS: Final = (LAYT, MOEL, EXPI, SHRD)  # all of them or none
FILE_SECTIONS: Final = (FILE, BNDL)  # both or neither
APPENDICES: Final = (PROF, SPRS, DRFT, ASTC, ANEC)  # ancillary, after the data sections
SECTION_CRITICAL: Final = 1  # section flag bit 0

# Record codecs.
RAW: Final = 0
ZSTD: Final = 1
CODECS: Final = {RAW: "raw", ZSTD: "zstd"}

# Element types.
DTYPES: Final = {
    1: "f32", 2: "f16", 3: "bf16",
    4: "u8", 5: "i8", 6: "u16", 7: "i16", 8: "u32", 9: "i32", 10: "u64", 11: "i64",
}  # fmt: skip
DTYPE_IDS: Final = {name: number for number, name in DTYPES.items()}
DTYPE_SIZES: Final = {
    "f32": 4, "f16": 2, "bf16": 2,
    "u8": 1, "i8": 1, "u16": 2, "i16": 2, "u32": 4, "i32": 4, "u64": 8, "i64": 8,
}  # fmt: skip
FLOATS: Final = ("f32", "f16", "bf16")

# Quantization modes.
MODES: Final = {0: "raw", 1: "affine", 2: "mxfp4", 3: "mxfp8", 4: "nvfp4"}
MODE_IDS: Final = {name: number for number, name in MODES.items()}
AFFINE_BITS: Final = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS: Final = (32, 64, 128)
MICROSCALING: Final = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode: bits, group

# The largest finite number of each float type, and the largest E8M0 scale whose products stay below it.
LARGEST: Final = {"f32": (2 - 2**-23) * 2.0**127, "f16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
LARGEST_E8M0: Final = {
    "mxfp4": {"f32": 252, "f16": 140, "bf16": 252},
    "mxfp8": {"f32": 246, "f16": 134, "bf16": 246},
}

# Roles.
ROLES: Final = {
    0: "other", 1: "embedding", 2: "attention", 3: "router", 4: "shared", 5: "expert",
    6: "norm", 7: "head", 8: "dense", 9: "draft",
}  # fmt: skip
ROLE_IDS: Final = {name: number for number, name in ROLES.items()}

# Modules of an expert in the order in which a layout holds their tensors.
EXPERT_MODULES: Final = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "fc1": 0, "fc2": 1}

# content_flags: the founding document's bit numbers.
FLAG_ASTC, FLAG_TCA_TBE, FLAG_INT4, FLAG_INT3, FLAG_INT2 = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
FLAG_SPARSE, FLAG_ANE_COREML, FLAG_EAGLE_DRAFT, FLAG_MXFP4 = 1 << 5, 1 << 6, 1 << 7, 1 << 8
AFFINE_FLAGS: Final = {4: FLAG_INT4, 3: FLAG_INT3, 2: FLAG_INT2}
SECTION_FLAGS: Final = {SPRS: FLAG_SPARSE, DRFT: FLAG_EAGLE_DRAFT, ASTC: FLAG_ASTC, ANEC: FLAG_ANE_COREML}

HEADER: Final = np.dtype(
    {
        "names": [
            "magic", "major", "minor", "header_size", "required_features", "optional_features",
            "file_size", "directory_offset", "directory_count", "directory_entry_size",
            "directory_digest", "content_flags", "record_alignment", "head_size", "reserved",
            "header_digest",
        ],
        "formats": [
            "V8", "<u2", "<u2", "<u4", "<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "<u8", "<u4", "<u4",
            "<u8", "V168", "<u8",
        ],
        "offsets": [0, 8, 10, 12, 16, 24, 32, 40, 48, 52, 56, 64, 68, 72, 80, 248],
        "itemsize": HEADER_SIZE,
    }
)  # fmt: skip

HEADER_NUMBERS: Final = tuple(name for name in HEADER.names or () if name not in ("magic", "reserved"))

SECTION: Final = np.dtype(
    [
        ("type", "V4"), ("flags", "<u4"), ("offset", "<u8"), ("stored_size", "<u8"), ("raw_size", "<u8"),
        ("codec", "<u2"), ("reserved0", "V6"), ("digest", "<u8"), ("reserved1", "V16"),
    ]
)  # fmt: skip

# What one tensor is and where its parts lie inside its (decoded) record.
TENSOR: Final = np.dtype(
    [
        ("name_offset", "<u4"), ("name_length", "<u2"), ("role", "<u2"),
        ("mode", "u1"), ("dtype", "u1"), ("bits", "u1"), ("ndim", "u1"), ("group_size", "<u4"),
        ("shape", "<u8", (4,)),
        ("codes_offset", "<u8"), ("codes_size", "<u8"),
        ("scales_offset", "<u8"), ("scales_size", "<u8"),
        ("biases_offset", "<u8"), ("biases_size", "<u8"),
    ]
)  # fmt: skip

# Where one record's stored bytes lie in the file.
RECORD: Final = np.dtype(
    [
        ("offset", "<u8"), ("stored_size", "<u8"), ("raw_size", "<u8"),
        ("codec", "<u2"), ("layout", "<u2"), ("reserved", "V4"), ("digest", "<u8"),
    ]
)  # fmt: skip

RESIDENT: Final = np.dtype([("tensor", TENSOR), ("record", RECORD)])
EXPERT: Final = np.dtype([("layer", "<u4"), ("expert", "<u4"), ("record", RECORD)])
LAYOUT: Final = np.dtype([("first_tensor", "<u4"), ("tensor_count", "<u4"), ("raw_size", "<u8")])
LAYOUT_HEAD: Final = np.dtype([("layout_count", "<u4"), ("tensor_count", "<u4")])
MOE_LAYER: Final = np.dtype(
    [("layer", "<u4"), ("expert_count", "<u4"), ("name_offset", "<u4"), ("name_length", "<u2"), ("reserved", "V2")]
)
EMBEDDED: Final = np.dtype([("name_offset", "<u4"), ("name_length", "<u2"), ("reserved", "V2"), ("record", RECORD)])


def printable(text: str) -> str:
    """`text` as it is, or escaped if any character of it is not printable."""
    return text if text.isprintable() else ascii(text)


def align(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` at or after `offset`."""
    return -(-offset // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a tensor's numbers are stored.

    `mode` raw: elements of `dtype`, `bits` and `group_size` 0. `mode` affine: `dtype` is that of
    scales and biases. Microscaling modes: scales are one byte, `dtype` is the one to decode into.
    """

    mode: str
    dtype: str
    bits: int = 0
    group_size: int = 0

    def is_registered(self) -> bool:
        """Whether (mode, dtype, bits, group size) is in the spec's registry."""
        if self.mode == "raw":
            return self.dtype in DTYPE_SIZES and self.bits == self.group_size == 0
        if self.dtype not in FLOATS:
            return False
        if self.mode == "affine":
            return self.bits in AFFINE_BITS and self.group_size in AFFINE_GROUPS
        return MICROSCALING.get(self.mode) == (self.bits, self.group_size)

    def part_sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Bytes of (codes, scales, biases) for a tensor of logical `shape`; 0 where absent.

        The last dimension must be a multiple of `group_size`.
        """
        elements = 1
        for size in shape:
            elements *= size
        if self.mode == "raw":
            return elements * DTYPE_SIZES[self.dtype], 0, 0
        groups = elements // self.group_size
        codes = elements * self.bits // 8
        if self.mode == "affine":
            scales = groups * DTYPE_SIZES[self.dtype]
            return codes, scales, scales
        return codes, groups, 0

    def content_flag(self) -> int:
        """The content_flags bit that this encoding sets, or 0."""
        if self.mode == "affine":
            return AFFINE_FLAGS.get(self.bits, 0)
        return FLAG_MXFP4 if self.mode == "mxfp4" else 0

    def __str__(self) -> str:
        if self.mode == "raw":
            return self.dtype
        return f"{self.mode} {self.bits}-bit g{self.group_size} ({self.dtype})"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a record: name, role, encoding, logical shape, and its parts as (offset, size)."""

    name: str
    role: str
    encoding: Encoding
    shape: tuple[int, ...]
    codes: tuple[int, int]
    scales: tuple[int, int]
    biases: tuple[int, int]

    @property
    def label(self) -> str:
        """The name, escaped where a terminal could misread it."""
        return printable(self.name)

    @property
    def parameters(self) -> int:
        """How many numbers the tensor stands for."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and biases, without padding."""
        return self.codes[1] + self.scales[1] + self.biases[1]

    @property
    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """The parts that exist, in file order: (codes | scales | biases, offset, size)."""
        named = (("codes", self.codes), ("scales", self.scales), ("biases", self.biases))
        return tuple((name, *span) for name, span in named if span[1])


def place(name: str, role: str, encoding: Encoding, shape: tuple[int, ...], start: int = 0) -> tuple[Tensor, int]:
    """Lay out one tensor's parts from `start`: codes, scales, biases, each aligned to 64 bytes.

    Returns the tensor and the offset just after its last part.
    """
    spans, end = [], start
    for size in encoding.part_sizes(shape):
        offset = align(end, PART_ALIGNMENT) if size else 0
        spans.append((offset, size))
        end = offset + size if size else end
    return Tensor(name, role, encoding, shape, spans[0], spans[1], spans[2]), end


def expert_rank(name: str) -> tuple[int, bool] | None:
    """What the order of a layout's tensors goes by: gate, up, down (or fc1, fc2), in each weight first.

    None for tensors of other modules, whose place is free.
    """
    module, _, leaf = name.partition(".")
    return (EXPERT_MODULES[module], leaf != "weight") if module in EXPERT_MODULES else None


@dataclass(frozen=True, slots=True)
class Layout:
    """What every expert record that names it holds: tensors in file order, decoded size."""

    tensors: tuple[Tensor, ...]
    raw_size: int


def make_layout(tensors: Sequence[tuple[str, str, Encoding, tuple[int, ...]]]) -> Layout:
    """Lay out (name, role, encoding, shape) one after another as one expert record."""
    placed, end = [], 0
    for name, role, encoding, shape in tensors:
        tensor, end = place(name, role, encoding, shape, end)
        placed.append(tensor)
    return Layout(tuple(placed), end)


@dataclass(frozen=True, slots=True)
class Record:
    """Where stored bytes lie: file offset, stored and decoded size, codec id, XXH64 of the stored bytes."""

    offset: int
    stored_size: int
    raw_size: int
    codec: int
    digest: int
    layout: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """One directory entry."""

    type: bytes
    critical: bool
    offset: int
    stored_size: int
    raw_size: int
    codec: int
    digest: int

    @property
    def label(self) -> str:
        """The type, escaped where it is not four printable ASCII characters."""
        return printable(self.type.decode("latin-1"))


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One module that holds experts: its id in the expert index, module path, and expert count."""

    layer: int
    path: str
    expert_count: int


Bytes = bytes | bytearray | memoryview
Array = npt.NDArray[np.generic]
