"""STRS, FILE, TENS, LAYT, MOEL and EXPI: what the head says about names, tensors and records.

Every entry is checked against the payload's layout without reading the payload. Entries are read as
plain tuples: a NumPy scalar wraps where the format wants an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from . import layout as L
from .directory import Head
from .faults import Findings
from .metadata import is_file_name

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
Row = tuple[Any, ...]  # one index entry as np.ndarray.tolist() gives it
_RECORD_AT = L.TENSOR.itemsize  # of a RESIDENT
_AT_ONCE = 256


def check_sizes(head: Head, findings: Findings) -> None:
    """Whether every index is a whole number of entries, and not too many."""

    def require(kind: bytes, size: int, expected: int, counts: tuple[tuple[int, int], ...]) -> None:
        at = head.by_type[kind].offset
        if size != expected:
            findings.add("index-size", at, f"{kind.decode()}: {size} bytes are no whole number of entries")
        for count, limit in counts:
            if count > limit:
                findings.add("index-count", at, f"{kind.decode()}: {count} entries, at most {limit}")

    for kind, entry, limit in _INDEXES:
        if kind not in head.by_type:
            continue
        size = len(head.section(kind))
        if kind == L.LAYT:
            layouts, tensors = _layt_counts(head)
            expected = L.LAYOUT_HEAD.itemsize + layouts * L.LAYOUT.itemsize + tensors * L.TENSOR.itemsize
            require(kind, size, expected, ((layouts, L.MAX_LAYOUTS), (tensors, L.MAX_LAYOUT_TENSORS)))
        else:
            require(kind, size, size - size % entry.itemsize, ((size // entry.itemsize, limit),))
    findings.close_stage()


_INDEXES = (
    (L.FILE, L.EMBEDDED, L.MAX_FILES),
    (L.TENS, L.RESIDENT, L.MAX_TENSORS),
    (L.LAYT, L.LAYOUT, L.MAX_LAYOUTS),
    (L.MOEL, L.MOE_LAYER, L.MAX_MOE_LAYERS),
    (L.EXPI, L.EXPERT, L.MAX_EXPERT_RECORDS),
)


def _layt_counts(head: Head) -> tuple[int, int]:
    data = head.section(L.LAYT)
    if len(data) < L.LAYOUT_HEAD.itemsize:
        return 0, 0
    layouts, tensors = np.frombuffer(data, L.LAYOUT_HEAD, 1).tolist()[0]
    return layouts, tensors


def _rows(data: L.Bytes, entry: np.dtype[Any]) -> Iterator[Row]:
    """The entries of a table; few at a time are tuples, as those take several times the memory."""
    table = np.frombuffer(data, entry)
    for first in range(0, len(table), _AT_ONCE):
        yield from table[first : first + _AT_ONCE].tolist()


class IndexReader:
    """Reads the indexes in file order; names, and the flags that encodings imply, accumulate."""

    def __init__(self, head: Head, findings: Findings) -> None:
        self.head, self.findings = head, findings
        self.flags = 0
        self._names = head.section(L.STRS)
        self._used: dict[int, str] = {}  # by offset << 16 | length
        self._names_end = 0
        self._encodings: dict[L.Encoding, L.Encoding] = {}  # one object each, however many tensors

    def rows(self, kind: bytes, entry: np.dtype[Any]) -> tuple[Iterator[Row], int]:
        """The entries of an index, and its offset."""
        return _rows(self.head.section(kind), entry), self.head.by_type[kind].offset

    # -- names -----------------------------------------------------------------------------------------

    def name(self, offset: int, length: int, at: int) -> str:
        """A name, or an empty string after a fault that leaves none."""
        add = self.findings.add
        if not 1 <= length <= L.MAX_NAME_LENGTH:
            add("name-length", at + 4, f"a name of {length} bytes")
            return ""
        if offset + length > len(self._names):
            add("name-range", at, f"name at {offset} of {length} bytes, STRS has {len(self._names)}")
            return ""
        known = self._used.get(offset << 16 | length)
        if known is not None:
            return known
        if offset != self._names_end:
            add("name-place", at, f"name at {offset}, the names before it end at {self._names_end}")
        raw = bytes(self._names[offset : offset + length])
        self._names_end = offset + length
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            add("name-utf8", at, f"name {raw[:40]!r} is not UTF-8")
            name = ""
        if _CONTROL.search(name):
            add("name-control", at, f"name {name[:40]!a} has a control character")
        self._used[offset << 16 | length] = name
        return name

    def names_end(self) -> None:
        """Call after the last index: every byte of STRS belongs to a name."""
        if self._names_end != len(self._names):
            self.findings.add(
                "name-fill",
                self.head.by_type[L.STRS].offset + self._names_end,
                f"names end at {self._names_end}, STRS at {len(self._names)}",
            )

    # -- tensors and records -----------------------------------------------------------------------------

    def tensor(self, row: Row, at: int, start: int, in_layout: bool) -> tuple[L.Tensor | None, str, int]:
        """Check one TENSOR whose parts must start at `start`.

        Returns it (None if it makes no sense), what to call it, and where its parts end.
        """
        name_offset, name_length, role_id, mode_id, dtype_id, bits, ndim, group_size, dims, *parts = row
        add, before = self.findings.add, len(self.findings.faults)
        name = self.name(name_offset, name_length, at)
        label = L.printable(name) if name else f"entry at {at}"
        role, mode, dtype = L.ROLES.get(role_id), L.MODES.get(mode_id), L.DTYPES.get(dtype_id)
        if role is None or (role == "expert") != in_layout:
            add("tensor-role", at + 6, f"{label}: role {role or role_id}")
        if mode is None:
            add("tensor-mode", at + 8, f"{label}: mode {mode_id}")
        if dtype is None:
            add("tensor-dtype", at + 9, f"{label}: dtype {dtype_id}")
        encoding = L.Encoding(mode or "", dtype or "", bits, group_size)
        if mode is not None and dtype is not None and not encoding.is_registered():
            add("tensor-encoding", at + 8, f"{label}: {encoding} is not registered")
        dims = [int(d) for d in dims]
        shape = tuple(dims[:ndim])
        if not 1 <= ndim <= L.MAX_DIMENSIONS:
            add("tensor-dims", at + 11, f"{label}: {ndim} dimensions")
        elif any(dims[ndim:]):
            add("tensor-unused-dim", at + 16 + 8 * ndim, f"{label}: shape {dims} with {ndim} dimensions")
        if 0 in shape:
            add("tensor-zero-dim", at + 16, f"{label}: shape {list(shape)}")
        elements = 1
        for d in shape:
            elements *= d
        if elements > L.MAX_ELEMENTS:
            add("tensor-overflow", at + 16, f"{label}: shape {list(shape)}")
        if len(self.findings.faults) > before:
            return None, label, start
        if group_size and shape[-1] % group_size:
            add("row-not-divisible", at + 16, f"{label}: rows of {shape[-1]}, groups of {group_size}")
            return None, label, start
        encoding = self._encodings.setdefault(encoding, encoding)
        expected, end = L.place(name, role or "", encoding, shape, start)
        self._check_parts(expected, parts, at, label)
        self.flags |= encoding.content_flag()
        return expected, label, end

    def _check_parts(self, expected: L.Tensor, found: list[int], at: int, label: str) -> None:
        wanted = (expected.codes, expected.scales, expected.biases)
        for i, part in enumerate(("codes", "scales", "biases")):
            offset, size = found[2 * i : 2 * i + 2]
            where = at + 48 + 16 * i
            if size != wanted[i][1]:
                self.findings.add("part-size", where + 8, f"{label}: {part} of {size} bytes, not {wanted[i][1]}")
            elif offset + size > L.MAX_RECORD_SIZE:
                self.findings.add("part-range", where, f"{label}: {part} at {offset} leave the record")
            elif offset != wanted[i][0]:
                self.findings.add("part-offset", where, f"{label}: {part} at {offset}, not {wanted[i][0]}")

    def _record(self, row: Row, at: int, label: str, expected: int) -> tuple[L.Record, int]:
        """Check one RECORD outside EXPI, which must start at `expected`; returns it and where it ends."""
        offset, stored_size, raw_size, codec, layout, reserved, digest = row
        add = self.findings.add
        if offset != expected:
            add("record-offset", at, f"{label}: at {offset}, not {expected}")
        if codec not in L.CODECS:
            add("record-codec", at + 24, f"{label}: codec {codec}")
        if max(stored_size, raw_size) > L.MAX_RECORD_SIZE:
            add("record-limit", at + 8, f"{label}: {stored_size} bytes stored, {raw_size} decoded")
        if not stored_size or not raw_size:
            add("record-empty", at + 8, f"{label}: {stored_size} bytes stored, {raw_size} decoded")
        if codec == L.RAW and stored_size != raw_size:
            add("record-size", at + 8, f"{label}: {stored_size} stored, {raw_size} raw")
        if codec == L.ZSTD and raw_size > stored_size * L.MAX_ZSTD_RATIO:
            add("record-ratio", at + 16, f"{label}: {stored_size} bytes decode to {raw_size}")
        if layout:
            add("record-layout", at + 26, f"{label}: layout {layout}")
        if any(reserved):
            add("index-reserved", at + 28, f"{label}: reserved bytes are not zero")
        return L.Record(offset, stored_size, raw_size, codec, digest), offset + stored_size

    def _fills(self, kind: bytes, end: int) -> None:
        s = self.head.by_type[kind]
        if end != s.offset + s.stored_size:
            self.findings.add(
                "record-range", s.offset, f"records end at {end}, {s.label} at {s.offset + s.stored_size}"
            )

    # -- the indexes -------------------------------------------------------------------------------------

    def files(self) -> dict[str, L.Record]:
        """FILE: records of the embedded files by name."""
        found: dict[str, L.Record] = {}
        folded: set[str] = set()
        rows, base = self.rows(L.FILE, L.EMBEDDED)
        end = self.head.by_type[L.BNDL].offset
        for i, (name_offset, name_length, reserved, row) in enumerate(rows):
            at = base + i * L.EMBEDDED.itemsize
            name = self.name(name_offset, name_length, at)
            label = f"embedded file {L.printable(name) or i}"
            if name and not is_file_name(name):
                self.findings.add("file-name", at, f"embedded file {name[:80]!a}")
            if name and name.lower() in folded:
                self.findings.add("name-duplicate", at, f"{label} occurs twice")
            folded.add(name.lower())
            record, end = self._record(row, at + 8, label, L.align(end, L.PART_ALIGNMENT))
            if any(reserved):
                self.findings.add("index-reserved", at + 6, f"{label}: reserved bytes are not zero")
            found[name] = record
        self._fills(L.BNDL, end)
        return found

    def residents(self) -> dict[str, tuple[L.Tensor, L.Record]]:
        """TENS: resident tensors and their records by name."""
        found: dict[str, tuple[L.Tensor, L.Record]] = {}
        rows, base = self.rows(L.TENS, L.RESIDENT)
        end = self.head.by_type[L.RESD].offset
        for i, (tensor_row, record_row) in enumerate(rows):
            at = base + i * L.RESIDENT.itemsize
            tensor, label, raw_size = self.tensor(tensor_row, at, 0, in_layout=False)
            if tensor is not None and tensor.name in found:
                self.findings.add("name-duplicate", at, f"{label} occurs twice")
            record, end = self._record(record_row, at + _RECORD_AT, label, L.align(end, L.PART_ALIGNMENT))
            if tensor is None:
                continue
            if record.raw_size != raw_size:
                self.findings.add(
                    "record-raw-size", at + _RECORD_AT + 16, f"{label}: {record.raw_size}, parts end at {raw_size}"
                )
            found[tensor.name] = (tensor, record)
        self._fills(L.RESD, end)
        return found

    def layouts(self) -> tuple[L.Layout, ...]:
        """LAYT: the shard layouts."""
        data, base = memoryview(self.head.section(L.LAYT)), self.head.by_type[L.LAYT].offset
        layouts, tensors = _layt_counts(self.head)
        first = L.LAYOUT_HEAD.itemsize + layouts * L.LAYOUT.itemsize
        entries: list[Row] = np.frombuffer(data[L.LAYOUT_HEAD.itemsize : first], L.LAYOUT).tolist()
        rows = _rows(data[first:], L.TENSOR)
        found, taken = [], 0
        for i, (first_tensor, count, raw_size) in enumerate(entries):
            at = base + L.LAYOUT_HEAD.itemsize + i * L.LAYOUT.itemsize
            if first_tensor != taken or taken + count > tensors:
                self.findings.end("layout-range", at, f"layout {i}: tensors {first_tensor} + {count} of {tensors}")
            if count == 0:
                self.findings.add("layout-empty", at + 4, f"layout {i} has no tensor")
            layout, end = self._layout(islice(rows, count), base + first + taken * L.TENSOR.itemsize)
            if len(layout) == count and raw_size != end:
                self.findings.add("layout-raw-size", at + 8, f"layout {i}: raw_size {raw_size}, parts end at {end}")
            found.append(L.Layout(layout, raw_size))
            taken += count
        if taken != tensors:
            self.findings.add("layout-range", base, f"layouts take {taken} of {tensors} tensors")
        return tuple(found)

    def _layout(self, rows: Iterable[Row], at: int) -> tuple[tuple[L.Tensor, ...], int]:
        placed: dict[str, L.Tensor] = {}
        end, last = 0, (0, False)
        for row in rows:
            tensor, label, end = self.tensor(row, at, end, in_layout=True)
            if tensor is not None:
                if tensor.name in placed:
                    self.findings.add("name-duplicate", at, f"{label} occurs twice in its layout")
                rank = L.expert_rank(tensor.name)
                if rank is not None and rank < last:
                    self.findings.add("layout-order", at, f"{label} is out of order in its layout")
                last = max(rank or last, last)
                placed[tensor.name] = tensor
            at += L.TENSOR.itemsize
        return tuple(placed.values()), end

    def moe_layers(self) -> tuple[L.MoeLayer, ...]:
        """MOEL: the modules that hold experts."""
        rows, base = self.rows(L.MOEL, L.MOE_LAYER)
        found: list[L.MoeLayer] = []
        paths: set[str] = set()
        for i, (layer, count, name_offset, name_length, reserved) in enumerate(rows):
            at = base + i * L.MOE_LAYER.itemsize
            path = self.name(name_offset, name_length, at + 8)
            if path and path in paths:
                self.findings.add("name-duplicate", at + 8, f"module {L.printable(path)} occurs twice")
            if any(reserved):
                self.findings.add("index-reserved", at + 14, f"layer {layer}: reserved bytes are not zero")
            if found and layer <= found[-1].layer:
                self.findings.add("moe-layer-unsorted", at, f"layer {layer} after {found[-1].layer}")
            if count == 0:
                self.findings.add("moe-layer-experts", at + 4, f"layer {layer} has no experts")
            paths.add(path)
            found.append(L.MoeLayer(layer, path, count))
        return tuple(found)

    def names_inside_experts(self, residents: dict[str, Any], layers: tuple[L.MoeLayer, ...]) -> None:
        """A module of experts owns every name that starts with its path and a dot."""
        paths = {layer.path for layer in layers}
        for name in (*residents, *(layer.path for layer in layers)):
            dot = name.find(".")
            while dot >= 0:
                if name[:dot] in paths:
                    self.findings.add(
                        "name-inside-experts",
                        self.head.by_type[L.STRS].offset,
                        f"{L.printable(name)} lies in {L.printable(name[:dot])}",
                    )
                    break
                dot = name.find(".", dot + 1)
