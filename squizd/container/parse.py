"""From bytes to a checked table of contents: every structural rule of the spec, stage by stage.

Reads header, directory, metadata and indexes, never the payload. Reader and validator both stand on
it, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import layout as L
from . import metadata as meta
from .directory import Head, ReadAt, read_head
from .experts import read_experts
from .faults import Fault, Findings, Stop
from .indexes import IndexReader, check_sizes

__all__ = ["Contents", "ReadAt", "parse"]


@dataclass
class Contents:
    """What a file holds, as far as its head tells."""

    file_size: int = 0
    file_id: str = ""
    content_flags: int = 0
    optional_features: int = 0
    record_alignment: int = 0
    head_size: int = 0
    sections: tuple[L.Section, ...] = ()
    document: bytes = b""  # META, known to be right
    config: dict[str, int] = field(default_factory=dict)  # of it: the sizes that appendices refer to
    files: dict[str, L.Record] = field(default_factory=dict)
    residents: dict[str, tuple[L.Tensor, L.Record]] = field(default_factory=dict)
    layouts: tuple[L.Layout, ...] = ()
    moe_layers: tuple[L.MoeLayer, ...] = ()
    experts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, L.EXPERT))

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What META says; parsed when asked for, as it may take ten times the memory of its bytes."""
        return meta.decode(self.document) if self.document else {}

    def forget(self) -> None:
        """Let go of all that takes memory."""
        self.document, self.residents, self.layouts, self.experts = b"", {}, (), self.experts[:0].copy()


def parse(read_at: ReadAt, size: int) -> tuple[Contents, list[Fault]]:
    """Check a file of `size` bytes; returns what could be understood and every fault found.

    The contents are complete and safe to use only if there is no fault.
    """
    contents, findings = Contents(), Findings()
    try:
        head = read_head(read_at, size, findings)
        for name in ("file_size", "file_id", "content_flags", "optional_features", "record_alignment", "head_size"):
            setattr(contents, name, getattr(head, name))
        contents.sections = head.sections
        check_sizes(head, findings)
        _read_metadata(head, contents, findings)
        flags = _read_indexes(head, contents, findings)
        for kind, flag in L.SECTION_FLAGS.items():
            flags |= flag if kind in head.by_type else 0
        if flags != head.content_flags:
            findings.add("content-flags", 64, f"content_flags {head.content_flags:#x}, implied {flags:#x}")
    except Stop:
        pass
    return contents, findings.faults


def _read_metadata(head: Head, contents: Contents, findings: Findings) -> None:
    document = head.contents.pop(L.META)
    try:
        config = meta.decode(document)["model"]["config"]
    except meta.MetadataError as error:
        findings.end(error.code, head.by_type[L.META].offset, f"metadata: {error}")
    sizes = {name: config.get(name) for name in ("hidden_size", "num_hidden_layers")}
    contents.config = {name: size for name, size in sizes.items() if type(size) is int}
    contents.document = document


def _read_indexes(head: Head, contents: Contents, findings: Findings) -> int:
    """Fill `contents` from the indexes; returns the content flags that their encodings imply."""
    reader = IndexReader(head, findings)
    if L.FILE in head.by_type:
        contents.files = reader.files()
    contents.residents = reader.residents()
    del head.contents[L.TENS]
    if L.EXPI in head.by_type:
        contents.layouts = reader.layouts()
        contents.moe_layers = reader.moe_layers()
        del head.contents[L.LAYT]
    reader.names_inside_experts(contents.residents, contents.moe_layers)
    reader.names_end()
    findings.close_stage()
    if L.EXPI in head.by_type:
        contents.experts = read_experts(head, contents.layouts, contents.moe_layers, findings)
    return reader.flags
