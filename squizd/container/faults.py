"""The rules of the format that a file can break: one stable code each (spec, "Error codes").

The order of `RULES` is the order of the checks. Each stage is checked to its end; later stages are not
checked if one found a fault. `squizd.container` never reports a code that is not here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_FAULTS: Final = 1000


class Fault(NamedTuple):
    """One broken rule: its code, the byte offset of the offending field, and what was found."""

    code: str
    offset: int
    message: str


class Stop(Exception):
    """Later checks make no sense, or enough faults were found."""


class Findings:
    """The faults of one file in the order of the checks; at most `MAX_FAULTS` are kept."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def add(self, code: str, offset: int, message: str) -> None:
        """Note a fault; raises Stop when there are enough."""
        self.faults.append(Fault(code, offset, message))
        if len(self.faults) >= MAX_FAULTS:
            raise Stop

    def end(self, code: str, offset: int, message: str) -> None:
        """Note a fault after which nothing can be checked."""
        self.add(code, offset, message)
        raise Stop

    def close_stage(self) -> None:
        """Raises Stop if any fault was found so far."""
        if self.faults:
            raise Stop


# Stage -> code -> rule. The stages' and rules' text is that of the spec.
STAGES: Final[dict[str, dict[str, str]]] = {
    "signature": {
        "file-empty": "the file has at least one byte",
        "bad-magic": "the file starts with SQZD, or with as much of it as the file has bytes",
        "file-short": "the file holds a whole header",
        "text-mode-damage": "bytes 4 to 7 are 0D 0A 1A 0A; a text-mode transfer changes them",
        "version-zero": "the major version is not 0",
        "version-byte-swapped": "the major version is not 256, which is 1 in the wrong byte order",
        "version-future": "the major version is 1",
        "header-digest": "header_digest is the XXH64 of bytes 0 to 247",
    },
    "header": {
        "header-size": "header_size is 256",
        "unknown-required-feature": "no unknown bit of required_features is set",
        "file-truncated": "the file has at least file_size bytes",
        "trailing-bytes": "nothing follows file_size bytes",
        "directory-offset": "directory_offset is 256",
        "section-count": "the directory has 1 to 64 entries",
        "directory-entry-size": "directory_entry_size is 64",
        "record-alignment": "record_alignment is a power of two from 64 to 2^24",
        "head-limit": "head_size is at most 2^24 and at most file_size",
        "directory-range": "the directory lies inside the head",
        "header-reserved": "reserved header bytes are zero",
    },
    "directory": {
        "directory-digest": "directory_digest is the XXH64 of the directory",
    },
    "directory entries": {
        "section-type": "a section type is four ASCII letters or digits",
        "section-flags": "no section flag but bit 0 is set",
        "section-critical-flag": "a section of this specification has the critical bit that it prescribes",
        "section-unknown-critical": "no section of unknown type is critical",
        "section-empty": "no section is empty, stored or decoded",
        "section-codec": "the section's codec is registered, and raw unless the section is ancillary",
        "section-limit": "META and STRS have at most 2^21 bytes, ancillary sections 2^36, stored and decoded",
        "section-size": "stored and raw size of a section with codec raw are equal",
        "section-ratio": "a section with codec zstd decodes to at most 64 times its stored size",
        "section-reserved": "reserved bytes of a directory entry are zero",
        "data-section-digest": "the digest field of a data section is zero",
        "section-duplicate": "no section type occurs twice",
    },
    "sections": {
        "section-missing": "META STRS TENS RESD are present",
        "section-incomplete-set": "LAYT MOEL EXPI SHRD, and FILE BNDL, occur together",
        "section-order": "sections come in the prescribed order",
        "section-wraps": "offset + stored_size is below 2^64",
        "section-over-header": "no section starts inside header or directory",
        "section-overlap": "no section starts before the end of the one before it",
        "section-unaligned": "a section starts on its alignment",
        "section-gap": "a section starts at the first aligned byte after the one before; the last ends the file",
        "section-range": "a section ends inside the file",
        "head-size": "head_size is the end of the last head section",
    },
    "head": {
        "padding-nonzero": "bytes between sections, between records and between parts are zero",
        "section-digest": "a section's digest is the XXH64 of its stored bytes",
    },
    "index sizes": {
        "index-size": "an index is a whole number of entries",
        "index-count": "an index has no more entries than the limits allow",
    },
    "metadata": {
        "json-utf8": "a document is UTF-8 without byte order mark",
        "json-tokens": "a document has at most 2^17 commas and opening brackets",
        "json-depth": "a document nests at most 32 deep",
        "json-syntax": "a document is one JSON value and nothing else",
        "json-number": "integers lie within 2^53 - 1, other numbers are finite",
        "json-duplicate-key": "no object has a key twice",
        "json-string": "no string holds U+0000 or an unpaired surrogate",
        "metadata-type": "metadata has the members and types of its schema",
        "sibling-name": "a sibling's name is bare",
        "metadata-set": "set and siblings agree",
    },
    "indexes": {
        "layout-range": "layouts take the tensors of LAYT in order, all of them",
        "layout-empty": "a layout has at least one tensor",
        "name-length": "a name has 1 to 512 bytes",
        "name-range": "a name lies inside STRS",
        "name-place": "a name starts where the new names before it end, or is the very range of one before it",
        "name-utf8": "a name is UTF-8",
        "name-control": "a name has no control character",
        "file-name": "the name of an embedded file is bare",
        "tensor-role": "the role is registered, and `expert` exactly in layouts",
        "tensor-mode": "the mode is registered",
        "tensor-dtype": "the dtype is registered",
        "tensor-encoding": "(mode, dtype, bits, group size) is registered",
        "tensor-dims": "a tensor has 1 to 4 dimensions",
        "tensor-unused-dim": "shape entries past ndim are 0",
        "tensor-zero-dim": "no dimension is 0",
        "tensor-overflow": "a tensor has at most 2^48 elements",
        "row-not-divisible": "the last dimension is a multiple of the group size",
        "part-size": "codes, scales and biases have the sizes that shape and encoding imply",
        "part-range": "a part ends at or before 2^36",
        "part-offset": "parts follow one another, each at the next multiple of 64; an absent part has offset 0",
        "name-duplicate": "names are unique in their index; names of embedded files regardless of case",
        "record-offset": "a record starts at the first aligned byte after the one before",
        "record-codec": "the record's codec is registered",
        "record-limit": "a record has at most 2^36 bytes, stored and decoded",
        "record-empty": "a record is not empty, stored or decoded",
        "record-size": "stored and raw size of a record with codec raw are equal",
        "record-ratio": "a record with codec zstd decodes to at most 64 times its stored size",
        "record-layout": "an expert's layout exists; in other records the layout field is 0",
        "index-reserved": "reserved bytes of an index entry are zero",
        "record-raw-size": "raw_size is the end of the last part",
        "record-range": "records fill their section exactly",
        "layout-order": "tensors of expert modules (section 12) come by rank, in each rank those called weight first",
        "layout-raw-size": "a layout's raw_size is the end of its last part",
        "moe-layer-unsorted": "MOEL is strictly ascending by layer",
        "moe-layer-experts": "a layer has at least one expert",
        "name-inside-experts": "no tensor and no module of experts has a name inside a module of experts",
        "name-fill": "names fill STRS exactly",
    },
    "experts": {
        "expert-layer": "an expert's layer is listed in MOEL",
        "expert-range": "an expert's number is below its layer's count",
        "expert-duplicate": "no (layer, expert) occurs twice",
        "expert-unsorted": "EXPI is sorted by (layer, expert)",
        "expert-missing": "every expert of every layer has a record",
    },
    "content": {
        "content-flags": "content_flags are those that the indexes and sections imply",
    },
    "payload": {
        "record-digest": "a record's digest is the XXH64 of its stored bytes",
        "zstd-skippable": "coded bytes do not start with a skippable frame",
        "zstd-magic": "coded bytes start with a zstd frame",
        "zstd-header": "the frame header is whole, its unused and reserved bits are zero",
        "zstd-size-absent": "the frame states its content size",
        "zstd-size-mismatch": "the frame's content size is raw_size",
        "zstd-dictionary": "the frame names no dictionary",
        "zstd-checksum-missing": "the frame has a checksum",
        "zstd-window": "the frame's window is at most 2^23 bytes",
        "zstd-truncated": "the frame's blocks and checksum end inside the stored bytes",
        "zstd-block": "a block's type is registered and its size at most min(window, 2^17)",
        "zstd-blocks": "a frame has at most 16 + stored_size / 64 blocks",
        "zstd-trailing": "nothing follows the frame",
        "zstd-corrupt": "the frame decodes to raw_size bytes",
        "zstd-checksum": "the frame's checksum is that of its content",
        "scale-not-finite": "affine scales are finite",
        "bias-not-finite": "affine biases are finite",
        "e8m0-nan": "no E8M0 scale is FF",
        "e4m3-nan": "no E4M3 code or scale is 7F or FF",
        "value-overflow": "no decoded value can exceed the largest finite number of the tensor's dtype",
    },
    "appendices": {
        "appendix-line": "an appendix is lines of at most 2^21 bytes, each ended by 0A",
        "appendix-header": "the first line names the appendix and its version",
        "profile-type": "a profile has the members and types of its schema",
        "profile-layers": "a profile has one line per layer of MOEL, in order, with one value per expert",
        "profile-count": "counts are at least 0 and at most tokens",
        "profile-mass": "gate mass is at least 0, and 0 where the count is 0",
        "profile-coactivation": "pairs are ascending, of two experts, counted no oftener than either",
        "sparsity-type": "sparsity has the members and types of its schema",
        "sparsity-layers": "sparsity has one line per layer of MOEL, in order, with one entry per expert",
        "sparsity-width": "width is the number of rows of the expert's up_proj or fc1",
        "sparsity-clusters": "an expert has 1 to width clusters",
        "sparsity-boundaries": "boundaries ascend strictly from 0 to width, one more than clusters",
        "sparsity-histogram": "a histogram has one fraction from 0 to 1 per cluster",
        "sparsity-digest": "digest is that of the expert's record",
        "draft-type": "a draft head has the members and types of its schema",
        "draft-hidden": "hidden is the model's hidden_size",
        "draft-source-layer": "there are source layers, strictly ascending, all below the model's num_hidden_layers",
        "draft-tensors": "a draft head lists exactly the resident tensors of role draft, in file order",
        "draft-digest": "a tensor's digest is that of its record",
    },
}
RULES: Final[dict[str, str]] = {code: rule for stage in STAGES.values() for code, rule in stage.items()}
