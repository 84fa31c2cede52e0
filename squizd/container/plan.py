"""All that a file will hold before any value is known, and the head that follows from it.

The head has its final size from the start: only digests, offsets and stored sizes are filled in later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError
from . import layout as L
from . import metadata as meta
from .parse import parse

TensorPlan = tuple[str, str, L.Encoding, tuple[int, ...]]  # name, role, encoding, shape


@dataclass
class Plan:
    """All that a file will hold, before any value is known."""

    metadata: dict[str, Any]
    residents: list[TensorPlan]
    bundle: dict[str, bytes] = field(default_factory=dict)
    layouts: list[L.Layout] = field(default_factory=list)
    moe_layers: list[L.MoeLayer] = field(default_factory=list)
    expert_layouts: list[list[int]] = field(default_factory=list)  # [position in moe_layers][expert] -> layout
    record_alignment: int = L.DEFAULT_RECORD_ALIGNMENT
    codec: int = L.RAW  # ZSTD: for every record that gets smaller by it
    appendices: dict[bytes, bytes] = field(default_factory=dict)  # by type: decoded bytes
    fingerprint: bytes = b""  # what else a resumed run must agree on: source and arguments


def choose_alignment(raw_sizes: Iterable[int], limit: float = 0.01) -> int:
    """The largest power of two up to 16 KiB whose padding costs at most `limit` of the expert bytes."""
    sizes, alignment = list(raw_sizes), L.DEFAULT_RECORD_ALIGNMENT
    while alignment > L.PART_ALIGNMENT:
        if sum(L.align(size, alignment) - size for size in sizes) <= limit * sum(sizes):
            break
        alignment //= 2
    return alignment


class HeadPlan:
    """The head of a planned file: indexes as arrays to fill in, sections as bytes, and where they lie.

    `tensors[i]` are the tensors and the decoded size of record i, residents first, then experts by
    (layer, expert); `layout_ids[i]` is its layout field.
    """

    def __init__(self, plan: Plan) -> None:
        self._names, self._name_at = bytearray(), dict[str, int]()
        self.files = np.zeros(len(plan.bundle), L.EMBEDDED)
        for e, name in zip(self.files, sorted(plan.bundle), strict=True):
            self._put_name(e, name)
        self.residents = np.zeros(len(plan.residents), L.RESIDENT)
        self.tensors: list[tuple[tuple[L.Tensor, ...], int]] = []
        for e, (name, role, encoding, shape) in zip(self.residents, plan.residents, strict=True):
            tensor, size = L.place(name, role, encoding, shape)
            self._put_tensor(e["tensor"], tensor)
            self.tensors.append(((tensor,), size))
        pairs = [(x.layer, i) for x in plan.moe_layers for i in range(x.expert_count)]
        flat_layouts = [layout for layer in plan.expert_layouts for layout in layer]
        self.experts = np.zeros(len(pairs), L.EXPERT)
        if pairs:
            self.experts["layer"], self.experts["expert"] = np.array(pairs).T
        self.tensors += [(plan.layouts[i].tensors, plan.layouts[i].raw_size) for i in flat_layouts]
        self.layout_ids = [0] * len(plan.residents) + flat_layouts
        self.sections = {L.META: meta.encode(plan.metadata), L.STRS: b""}
        if plan.bundle:
            self.sections[L.FILE] = bytes(self.files)
        self.sections[L.TENS] = bytes(self.residents)
        if pairs:
            self.sections[L.LAYT], self.sections[L.MOEL] = self._layt(plan), self._moel(plan)
            self.sections[L.EXPI] = bytes(self.experts)
        self.sections[L.STRS] = bytes(self._names)
        self.record_alignment = plan.record_alignment
        data = ([L.BNDL] if plan.bundle else []) + [L.RESD] + ([L.SHRD] if pairs else [])
        self._count = len(self.sections) + len(data) + len(plan.appendices)
        self.appendices: dict[bytes, tuple[int, int, int, int, int]] = {}  # offset, stored, raw, codec, digest
        self.spans, end = dict[bytes, tuple[int, int]](), L.HEADER_SIZE + self._count * L.DIRECTORY_ENTRY_SIZE
        for kind, content in self.sections.items():
            start = L.align(end, L.PART_ALIGNMENT)
            self.spans[kind], end = (start, len(content)), start + len(content)
        self.size = end

    def assemble(self, file_size: int) -> bytes:
        """The head's bytes from the arrays' present values. `appendices` must be filled in."""
        arrays = {L.FILE: self.files, L.TENS: self.residents, L.EXPI: self.experts}
        self.sections.update({kind: bytes(array) for kind, array in arrays.items() if len(array)})
        head = bytearray(self.size)
        entries: list[tuple[Any, ...]] = []
        for kind, (offset, size) in self.spans.items():
            content = self.sections[kind]
            head[offset : offset + size] = content
            entries.append(_entry(kind, offset, size, size, L.RAW, xxhash.xxh64_intdigest(content)))
        for kind, array in ((L.BNDL, self.files), (L.RESD, self.residents), (L.SHRD, self.experts)):
            if len(array):
                start, last = int(array["record"]["offset"][0]), array["record"][-1]
                end = L.align(int(last["offset"] + last["stored_size"]), self.record_alignment if kind == L.SHRD else 1)
                entries.append(_entry(kind, start, end - start, end - start, L.RAW, 0))
        entries += [_entry(kind, *values) for kind, values in self.appendices.items()]
        directory = bytes(np.array(entries, L.SECTION))
        head[L.HEADER_SIZE : L.HEADER_SIZE + len(directory)] = directory
        head[: L.HEADER_SIZE] = self._header(directory, file_size)
        return bytes(head)

    def check(self, head: bytes, file_size: int, path: str) -> None:
        """Raises OutputError if a reader would reject a file with this head."""
        _, faults = parse(lambda offset, size: head[offset : offset + size], file_size)
        if faults:
            raise OutputError(f"cannot write {path}: {faults[0].message} [{faults[0].code}]")

    def _header(self, directory: bytes, file_size: int) -> bytes:
        flags = 0
        for tensors in dict.fromkeys(tensors for tensors, _ in self.tensors):
            for tensor in tensors:
                flags |= tensor.encoding.content_flag()
        for kind in self.appendices:
            flags |= L.SECTION_FLAGS.get(kind, 0)
        h = np.zeros(1, L.HEADER)
        h["magic"], h["major"], h["minor"], h["header_size"] = L.MAGIC, L.MAJOR, L.MINOR, L.HEADER_SIZE
        h["file_size"], h["directory_offset"], h["directory_count"] = file_size, L.HEADER_SIZE, self._count
        h["directory_entry_size"], h["directory_digest"] = L.DIRECTORY_ENTRY_SIZE, xxhash.xxh64_intdigest(directory)
        h["content_flags"], h["record_alignment"], h["head_size"] = flags, self.record_alignment, self.size
        h["header_digest"] = xxhash.xxh64_intdigest(bytes(h)[:248])
        return bytes(h)

    def _put_name(self, entry: Any, name: str) -> None:
        raw = name.encode("utf-8")
        if name not in self._name_at:
            self._name_at[name] = len(self._names)
            self._names += raw
        entry["name_offset"], entry["name_length"] = self._name_at[name], len(raw)

    def _put_tensor(self, e: Any, t: L.Tensor) -> None:
        self._put_name(e, t.name)
        encoding = t.encoding
        e["role"], e["mode"], e["dtype"] = L.ROLE_IDS[t.role], L.MODE_IDS[encoding.mode], L.DTYPE_IDS[encoding.dtype]
        e["bits"], e["group_size"], e["ndim"] = encoding.bits, encoding.group_size, len(t.shape)
        e["shape"] = t.shape + (0,) * (L.MAX_DIMENSIONS - len(t.shape))
        for part in ("codes", "scales", "biases"):
            e[f"{part}_offset"], e[f"{part}_size"] = getattr(t, part)

    def _layt(self, plan: Plan) -> bytes:
        head = np.zeros(1, L.LAYOUT_HEAD)
        entries = np.zeros(len(plan.layouts), L.LAYOUT)
        tensors = np.zeros(sum(len(x.tensors) for x in plan.layouts), L.TENSOR)
        head["layout_count"], head["tensor_count"] = len(entries), len(tensors)
        first = 0
        for e, layout in zip(entries, plan.layouts, strict=True):
            e["first_tensor"], e["tensor_count"], e["raw_size"] = first, len(layout.tensors), layout.raw_size
            for i, tensor in enumerate(layout.tensors):
                self._put_tensor(tensors[first + i], tensor)
            first += len(layout.tensors)
        return bytes(head) + bytes(entries) + bytes(tensors)

    def _moel(self, plan: Plan) -> bytes:
        entries = np.zeros(len(plan.moe_layers), L.MOE_LAYER)
        for e, layer in zip(entries, plan.moe_layers, strict=True):
            e["layer"], e["expert_count"] = layer.layer, layer.expert_count
            self._put_name(e, layer.path)
        return bytes(entries)


def _entry(kind: bytes, offset: int, stored_size: int, raw_size: int, codec: int, digest: int) -> tuple[Any, ...]:
    flags = L.SECTION_CRITICAL if kind in L.CRITICAL_SECTIONS else 0
    return kind, flags, offset, stored_size, raw_size, codec, b"", digest, b""


def check_plan(plan: Plan, path: str) -> int:
    """The file's size if no record gets smaller; OutputError if the plan makes no valid file, whatever the values."""
    if not plan.residents:
        raise OutputError(f"cannot write {path}: a file holds at least one resident tensor")
    head = HeadPlan(plan)
    end = head.size
    for name, e in zip(sorted(plan.bundle), head.files, strict=True):
        end = _put_record(e["record"], L.align(end, L.PART_ALIGNMENT), len(plan.bundle[name]), 0)
    first_expert = len(plan.residents)
    entries = [*head.residents, *head.experts]
    for i, (e, (_, size), layout) in enumerate(zip(entries, head.tensors, head.layout_ids, strict=True)):
        alignment = L.PART_ALIGNMENT if i < first_expert else plan.record_alignment
        end = _put_record(e["record"], L.align(end, alignment), size, layout)
    if len(head.experts):
        end = L.align(end, plan.record_alignment)
    for kind, content in plan.appendices.items():
        start = L.align(end, L.PART_ALIGNMENT)
        head.appendices[kind] = start, len(content), len(content), L.RAW, 0
        end = start + len(content)
    head.check(head.assemble(end), end, path)
    return end


def _put_record(r: Any, offset: int, size: int, layout: int) -> int:
    r["offset"], r["stored_size"], r["raw_size"], r["layout"] = offset, size, size, layout
    return offset + size
