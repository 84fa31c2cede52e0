"""EXPI: where every expert's record lies. Vectorized: a file can have 131,072 of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout as L
from .directory import Head
from .faults import Findings

Entries = np.ndarray[Any, Any]  # of L.EXPERT


def read_experts(
    head: Head, layouts: tuple[L.Layout, ...], layers: tuple[L.MoeLayer, ...], findings: Findings
) -> Entries:
    """The entries of EXPI, each a record that exists, has a known layout, and lies where it should."""
    entries, base = np.frombuffer(head.section(L.EXPI), L.EXPERT), head.by_type[L.EXPI].offset
    _check_listed(entries, base, layers, findings)
    findings.close_stage()
    r = entries["record"]
    offset, stored, raw, codec = r["offset"], r["stored_size"], r["raw_size"], r["codec"]
    limit = np.uint64(L.MAX_RECORD_SIZE)
    too_big = (stored > limit) | (raw > limit)
    size = np.where(too_big, 0, stored).astype(np.int64)  # so that nothing below can wrap
    sizes = np.array([layout.raw_size for layout in layouts] or [0], np.uint64)
    known = r["layout"] < len(layouts)
    expected = _expected_offsets(offset, size, head)
    shard = head.by_type[L.SHRD]
    rules: tuple[tuple[str, npt.NDArray[np.bool_], int, str], ...] = (
        ("record-offset", offset != expected[:-1], 0, "not where it should lie"),
        ("record-codec", ~np.isin(codec, list(L.CODECS)), 24, "unknown codec"),
        ("record-limit", too_big, 8, "too many bytes"),
        ("record-empty", (stored == 0) | (raw == 0), 8, "no bytes"),
        ("record-size", (codec == L.RAW) & (stored != raw), 8, "stored and raw size differ"),
        ("record-ratio", (codec == L.ZSTD) & _beyond_ratio(raw, size), 16, "decodes to too many bytes"),
        ("record-layout", ~known, 26, "no such layout"),
        ("index-reserved", r["reserved"].view("<u4") != 0, 28, "reserved bytes are not zero"),
        ("record-raw-size", known & (raw != sizes[np.where(known, r["layout"], 0)]), 16, "not that of its layout"),
    )
    for i, rule in np.argwhere(np.stack([bad for _, bad, _, _ in rules], axis=1)):
        code, _, shift, message = rules[rule]
        at = base + int(i) * L.EXPERT.itemsize + 8 + shift
        findings.add(code, at, f"layer {entries['layer'][i]} expert {entries['expert'][i]}: {message}")
    if int(expected[-1]) != shard.offset + shard.stored_size:
        end = shard.offset + shard.stored_size
        findings.add("record-range", shard.offset, f"records end at {int(expected[-1])}, SHRD at {end}")
    findings.close_stage()
    return entries


def _expected_offsets(
    offset: npt.NDArray[np.uint64], size: npt.NDArray[np.int64], head: Head
) -> npt.NDArray[np.uint64]:
    """Where each record must start, and where the last must end with its padding."""
    alignment = head.record_alignment
    start = np.minimum(offset, np.uint64(head.file_size)).astype(np.int64)
    ends = (start + size + alignment - 1) // alignment * alignment
    return np.concatenate([[head.by_type[L.SHRD].offset], ends]).astype(np.uint64)


def _beyond_ratio(raw: npt.NDArray[np.uint64], size: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    beyond: npt.NDArray[np.bool_] = raw > (size * L.MAX_ZSTD_RATIO).astype(np.uint64)
    return beyond


def _check_listed(entries: Entries, base: int, layers: tuple[L.MoeLayer, ...], findings: Findings) -> None:
    """EXPI lists (layer, expert) for exactly the experts of MOEL, in order."""
    counts = {layer.layer: layer.expert_count for layer in layers}
    if sum(counts.values()) == len(entries):
        wanted_layer = np.repeat([x.layer for x in layers], [x.expert_count for x in layers])
        wanted_expert = np.concatenate([np.arange(x.expert_count) for x in layers])
        if np.array_equal(entries["layer"], wanted_layer) and np.array_equal(entries["expert"], wanted_expert):
            return
    seen: set[int] = set()
    last = -1
    for i, (layer, expert) in enumerate(zip(entries["layer"].tolist(), entries["expert"].tolist(), strict=True)):
        at, pair = base + i * L.EXPERT.itemsize, layer << 32 | expert
        if layer not in counts:
            findings.add("expert-layer", at, f"layer {layer} is not in MOEL")
        elif expert >= counts[layer]:
            findings.add("expert-range", at + 4, f"layer {layer} expert {expert} of {counts[layer]}")
        elif pair in seen:
            findings.add("expert-duplicate", at, f"layer {layer} expert {expert} occurs twice")
        else:
            seen.add(pair)
            if pair < last:
                before = f"layer {last >> 32} expert {last & 0xFFFFFFFF}"
                findings.add("expert-unsorted", at, f"layer {layer} expert {expert} after {before}")
            last = max(last, pair)
    missing = sum(counts.values()) - len(seen)
    if missing:
        findings.add("expert-missing", base, f"{missing} experts have no record")
