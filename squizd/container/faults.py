"""The rules of the format that a file can break: one stable code each (spec, "Error codes")."""

from __future__ import annotations

from typing import Final, NamedTuple


class Fault(NamedTuple):
    """One broken rule: its code, the byte offset of the offending field, and what was found."""

    code: str
    offset: int
    message: str


RULES: Final[dict[str, str]] = {
    # header
    "file-empty": "the file has at least one byte",
    "file-short": "the file holds a whole 256-byte header",
    "bad-magic": "the first four bytes are SQZD",
    "text-mode-damage": "bytes 4 to 7 are 0D 0A 1A 0A; a text-mode transfer changes them",
    "version-zero": "the major version is not 0",
    "version-byte-swapped": "the major version is little-endian",
    "version-future": "the major version is 1",
    "header-size": "header_size is 256",
    "header-digest": "header_digest is the XXH64 of bytes 0 to 247",
    "header-reserved": "reserved header bytes are zero",
    "unknown-required-feature": "no unknown bit of required_features is set",
    "file-truncated": "the file is as long as file_size says",
    "trailing-bytes": "nothing follows file_size bytes",
    "directory-offset": "the directory starts right after the header",
    "directory-entry-size": "directory_entry_size is 64",
    "section-count": "the directory has 1 to 64 entries",
    "record-alignment": "record_alignment is a power of two from 64 to 2^24",
    "head-size": "head_size is the end of the last head section and at most 2^28",
    "content-flags": "content_flags are those that the indexes and sections imply",
    # directory
    "directory-range": "the directory lies inside the head",
    "directory-digest": "directory_digest is the XXH64 of the directory",
    "section-type": "a section type is four ASCII letters or digits",
    "section-flags": "no section flag other than bit 0 is set",
    "section-reserved": "reserved bytes of a directory entry are zero",
    "section-critical-flag": "a section of this specification has the critical bit that it prescribes",
    "section-unknown-critical": "no section of unknown type is critical",
    "section-duplicate": "no section type occurs twice",
    "section-missing": "required sections are present",
    "section-incomplete-set": "LAYT MOEL EXPI SHRD, and FILE BNDL, occur together",
    "section-order": "sections come in the prescribed order",
    "section-empty": "no section is empty",
    "section-codec": "the section's codec is registered and allowed for its type",
    "section-size": "stored and raw size of an uncoded section are equal",
    "section-wraps": "offset + stored_size does not wrap",
    "section-over-header": "no section lies over header or directory",
    "section-overlap": "sections do not overlap",
    "section-unaligned": "sections start on their alignment",
    "section-gap": "a section starts at the first aligned byte after the one before",
    "section-range": "sections lie inside the file",
    "section-digest": "a section's digest is the XXH64 of its stored bytes",
    "data-section-digest": "the digest field of a data section is zero",
    "padding-nonzero": "bytes between sections, records and parts are zero",
    # names
    "name-range": "a name lies inside STRS",
    "name-length": "a name has 1 to 512 bytes",
    "name-utf8": "a name is UTF-8",
    "name-control": "a name has no control character",
    "name-duplicate": "names are unique in their index",
    "file-name": "an embedded file's name is bare: letters, digits, dot, underscore, hyphen; no leading dot",
    # metadata
    "metadata-size": "metadata has at most 2^24 bytes",
    "metadata-utf8": "metadata is UTF-8 without byte order mark",
    "metadata-depth": "metadata nests at most 32 deep",
    "metadata-json": "metadata is one JSON value with nothing after it",
    "metadata-duplicate-key": "no object has a key twice",
    "metadata-number": "integers are within 2^53, other numbers finite",
    "metadata-type": "metadata has the members and types of its schema",
    # indexes
    "index-size": "an index is a whole number of entries",
    "index-count": "an index has no more entries than the limits allow",
    "index-reserved": "reserved bytes of an index entry are zero",
    # tensors
    "tensor-dims": "a tensor has 1 to 4 dimensions",
    "tensor-zero-dim": "no dimension is 0",
    "tensor-unused-dim": "shape entries past ndim are 0",
    "tensor-overflow": "a tensor has at most 2^48 elements",
    "tensor-dtype": "the dtype is registered",
    "tensor-mode": "the mode is registered",
    "tensor-encoding": "(mode, dtype, bits, group size) is registered",
    "tensor-role": "the role is registered, and `expert` exactly in layouts",
    "row-not-divisible": "the last dimension is a multiple of the group size",
    "part-size": "codes, scales and biases have the sizes that shape and encoding imply",
    "part-range": "parts lie inside their record",
    "part-offset": "parts follow one another, each at the next multiple of 64",
    # records
    "record-codec": "the record's codec is registered",
    "record-limit": "a record has at most 2^36 bytes, stored and decoded",
    "record-empty": "a record is not empty",
    "record-raw-size": "raw_size is the end of the last part",
    "record-size": "stored and raw size of an uncoded record are equal",
    "record-offset": "a record starts at the first aligned byte after the one before",
    "record-range": "records fill their section exactly",
    "record-layout": "an expert's layout exists; elsewhere the layout field is 0",
    # layouts and experts
    "layout-range": "layouts take the tensors of LAYT in order, all of them",
    "layout-empty": "a layout has at least one tensor",
    "layout-raw-size": "a layout's raw_size is the end of its last part",
    "moe-layer-unsorted": "MOEL is strictly ascending by layer",
    "moe-layer-experts": "a layer has at least one expert",
    "expert-layer": "an expert's layer is listed in MOEL",
    "expert-range": "an expert's number is below its layer's count",
    "expert-duplicate": "no (layer, expert) occurs twice",
    "expert-missing": "every expert of every layer has a record",
    "expert-unsorted": "EXPI is sorted by (layer, expert)",
    # deep: payload
    "record-digest": "a record's digest is the XXH64 of its stored bytes",
    "scale-not-finite": "scales are finite",
    "bias-not-finite": "biases are finite",
    "e8m0-nan": "no E8M0 scale is FF",
    "e4m3-nan": "no E4M3 value is 7F or FF",
    # deep: zstd
    "zstd-magic": "coded bytes start with a zstd frame",
    "zstd-skippable": "no skippable frame",
    "zstd-header": "the frame header is whole and has no reserved bit",
    "zstd-size-absent": "the frame states its content size",
    "zstd-size-mismatch": "the frame's content size is raw_size",
    "zstd-checksum-missing": "the frame has a checksum",
    "zstd-dictionary": "the frame needs no dictionary",
    "zstd-window": "the frame's window is at most 8 MiB",
    "zstd-corrupt": "the frame decodes, to raw_size bytes, and its checksum matches",
    "zstd-trailing": "exactly one frame, nothing after it",
}
