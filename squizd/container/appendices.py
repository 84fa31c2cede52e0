"""What the PROF, SPRS and DRFT appendices say (spec, "Appendices").

An appendix is JSON lines: the first names it, each further one speaks of one layer, so neither writer
nor reader holds more than a line. `check` is the deep validator's; `read_lines` is for whoever uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout as L
from . import restricted
from .metadata import is_sha256
from .parse import Contents
from .restricted import DocumentError

VERSION = 1
NAMES = {L.PROF: "profile", L.SPRS: "sparsity", L.DRFT: "draft"}

_DIGEST = re.compile("[0-9a-f]{16}")  # XXH64
_END: Any = object()  # after the last line: None is what the line `null` says
Document = dict[str, Any]
Lines = Iterator[Document]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the validator compares appendices with: little, as one line of them can take most of the memory."""

    config: dict[str, int]
    moe_layers: tuple[L.MoeLayer, ...]
    rows: tuple[frozenset[int], ...]  # of each layout: first dimensions of its up_proj and fc1
    layouts: npt.NDArray[np.uint16]  # of each expert
    digests: npt.NDArray[np.uint64]  # of each expert's record
    drafts: tuple[tuple[bytes, int], ...]  # names and record digests of the tensors of role draft, in file order

    @classmethod
    def of(cls, contents: Contents) -> Facts:
        """The facts of a file."""
        rows = (
            frozenset(t.shape[0] for t in layout.tensors if t.name in ("up_proj.weight", "fc1.weight"))
            for layout in contents.layouts
        )
        r = contents.experts["record"]
        drafts = ((name.encode(), r.digest) for name, (t, r) in contents.residents.items() if t.role == "draft")
        return cls(
            contents.config, contents.moe_layers, tuple(rows), r["layout"].copy(), r["digest"].copy(), tuple(drafts)
        )


def encode_lines(documents: Iterable[Document]) -> bytes:
    """The bytes of an appendix; raises DocumentError if a document cannot be stored."""
    lines = [restricted.encode(document) for document in documents]
    if any(len(line) > L.MAX_JSON_SIZE for line in lines):
        raise DocumentError("appendix-line", f"a line takes more than {L.MAX_JSON_SIZE} bytes")
    return b"".join(line + b"\n" for line in lines)


def read_lines(pieces: Iterable[L.Bytes]) -> Lines:
    """The objects of an appendix from its decoded bytes in any pieces; raises DocumentError."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        start = 0
        while (end := rest.find(b"\n", start)) >= 0:
            yield _document(rest[start:end])
            start = end + 1
        del rest[:start]
        if len(rest) > L.MAX_JSON_SIZE:
            break
    if rest:
        raise DocumentError("appendix-line", "a line is too long, or the last line does not end")


def _document(line: bytearray) -> Document:
    if len(line) > L.MAX_JSON_SIZE:
        raise DocumentError("appendix-line", "a line is too long")
    document: Document = restricted.decode(line)
    return document


def check(kind: bytes, lines: Lines, facts: Facts) -> None:
    """Raises DocumentError for the first rule that an appendix of type PROF, SPRS or DRFT breaks."""
    tokens = _check_header(kind, next(lines, None), facts)
    if tokens is not None:
        first = 0
        for layer in facts.moe_layers if kind in _LINES else ():
            _LINES[kind](next(lines, _END), layer, first, tokens, facts)
            first += layer.expert_count
        _require(next(lines, _END) is _END, _SURPLUS[kind], "more lines than there should be")
    while next(lines, _END) is not _END:  # lines that mean nothing to this version must still be lines
        pass


def _check_header(kind: bytes, header: Any, facts: Facts) -> int | None:
    """Check the first line; returns the tokens of a profile (else 0), or None if nothing else is to be checked.

    No line is kept while the next is parsed: a document can take twenty times the memory of its bytes.
    """
    if not isinstance(header, dict) or header.get("appendix") != NAMES[kind] or not _is_count(header.get("version")):
        raise DocumentError("appendix-header", f"the first line is no header of a {NAMES[kind]}")
    if header["version"] != VERSION:
        return None
    if kind == L.DRFT:
        _check_draft(header, facts)
    if kind != L.PROF:
        return 0
    fine = _is_count(header.get("tokens")) and is_sha256(header.get("text_sha256"))
    _require(fine, "profile-type", "tokens or text_sha256")
    tokens: int = header["tokens"]
    return tokens


# -- PROF ------------------------------------------------------------------------------------------------


def _check_profile(line: Any, layer: L.MoeLayer, first: int, tokens: int, facts: Facts) -> None:
    """The line of one layer."""

    def right(fine: bool, message: str) -> None:
        _require(fine, "profile-type", message)

    where = f"layer {layer.layer}"
    _require(line is not _END, "profile-layers", f"no line for {where}")
    right(isinstance(line, dict), f"{where}: no object")
    counts, mass = line.get("counts"), line.get("gate_mass")
    right(_is_count(line.get("layer")), f"{where}: layer")
    right(isinstance(counts, list) and all(_is_integer(n) for n in counts), f"{where}: counts")
    right(isinstance(mass, list) and all(_is_number(n) for n in mass), f"{where}: gate_mass")
    pairs = line.get("coactivation", [])
    right(isinstance(pairs, list) and all(_is_triple(p) for p in pairs), f"{where}: coactivation")
    matches = line["layer"] == layer.layer and len(counts) == len(mass) == layer.expert_count
    _require(matches, "profile-layers", f"{where}: the line is of layer {line['layer']}, {len(counts)} experts")
    _require(all(0 <= n <= tokens for n in counts), "profile-count", f"{where}: a count is negative or too high")
    fits = all(m >= 0 and (n or not m) for n, m in zip(counts, mass, strict=True))
    _require(fits, "profile-mass", f"{where}: gate mass below 0, or without activation")
    last = (-1, -1)
    for a, b, n in pairs:
        fine = last < (a, b) and 0 <= a < b < layer.expert_count and 1 <= n <= min(counts[a], counts[b])
        _require(fine, "profile-coactivation", f"{where}: pair {a}, {b} counted {n}")
        last = (a, b)


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_integer(n) for n in value)


# -- SPRS ------------------------------------------------------------------------------------------------


def _check_sparsity(line: Any, layer: L.MoeLayer, first: int, tokens: int, facts: Facts) -> None:
    """The line of one layer, whose experts are in EXPI from `first` on."""
    where = f"layer {layer.layer}"
    _require(line is not _END, "sparsity-layers", f"no line for {where}")
    _require(isinstance(line, dict), "sparsity-type", f"{where}: no object")
    experts: list[Document] = line["experts"] if isinstance(line.get("experts"), list) else [{}]
    fine = _is_count(line.get("layer")) and _is_count(line.get("width"))
    _require(fine and all(_is_sparse_expert(e) for e in experts), "sparsity-type", f"{where}: types")
    matches = line["layer"] == layer.layer and len(experts) == layer.expert_count
    _require(matches, "sparsity-layers", f"{where}: the line is of layer {line['layer']}, {len(experts)} experts")
    for i, expert in enumerate(experts):
        rows, digest = facts.rows[facts.layouts[first + i]], int(facts.digests[first + i])
        _check_expert(expert, line["width"], rows, digest, f"{where} expert {i}")


def _is_sparse_expert(e: Any) -> bool:
    return (
        isinstance(e, dict)
        and _is_integer(e.get("clusters"))
        and isinstance(e.get("boundaries"), list)
        and all(_is_integer(b) for b in e["boundaries"])
        and isinstance(e.get("histogram"), list)
        and all(_is_number(h) for h in e["histogram"])
        and isinstance(e.get("predictor"), dict)
        and isinstance(e["predictor"].get("kind"), str)
        and _is_digest(e.get("digest"))
    )


def _check_expert(e: Document, width: int, rows: frozenset[int], digest: int, where: str) -> None:
    _require(not rows or rows == {width}, "sparsity-width", f"{where}: width {width}")
    clusters, boundaries, histogram = e["clusters"], e["boundaries"], e["histogram"]
    _require(1 <= clusters <= width, "sparsity-clusters", f"{where}: {clusters} clusters")
    ascending = all(a < b for a, b in pairwise(boundaries))
    whole = len(boundaries) == clusters + 1 and boundaries[0] == 0 and boundaries[-1] == width
    _require(ascending and whole, "sparsity-boundaries", f"{where}: boundaries")
    fractions = len(histogram) == clusters and all(0 <= h <= 1 for h in histogram)
    _require(fractions, "sparsity-histogram", f"{where}: histogram")
    _require(e["digest"] == f"{digest:016x}", "sparsity-digest", f"{where}: digest of other weights")


# -- DRFT ------------------------------------------------------------------------------------------------


def _check_draft(header: Document, facts: Facts) -> None:
    layers, tensors = header.get("source_layers"), header.get("tensors")
    fine = _is_count(header.get("hidden")) and isinstance(header.get("kind"), str)
    fine = fine and isinstance(layers, list) and all(_is_integer(n) for n in layers)
    fine = fine and isinstance(tensors, list) and all(_is_draft_tensor(t) for t in tensors)
    _require(fine, "draft-type", "types")
    assert isinstance(layers, list)
    assert isinstance(tensors, list)
    hidden, count = facts.config.get("hidden_size"), facts.config.get("num_hidden_layers")
    agrees = hidden is None or hidden == header["hidden"]
    _require(agrees, "draft-hidden", f"hidden {header['hidden']}, the model has {hidden}")
    ascending = all(a < b for a, b in pairwise(layers))
    below = layers and layers[0] >= 0 and (count is None or layers[-1] < count)
    _require(bool(ascending and below), "draft-source-layer", f"source layers {layers[:8]} of {count}")
    same = len(tensors) == len(facts.drafts)
    same = same and all(t["name"].encode() == name for t, (name, _) in zip(tensors, facts.drafts, strict=True))
    _require(same, "draft-tensors", "not the tensors of role draft")
    for t, (_, digest) in zip(tensors, facts.drafts, strict=True):
        _require(t["digest"] == f"{digest:016x}", "draft-digest", f"{L.printable(t['name'])}: digest")


def _is_draft_tensor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and _is_digest(value.get("digest"))


# -- shared ----------------------------------------------------------------------------------------------

_LINES: dict[bytes, Callable[[Any, L.MoeLayer, int, int, Facts], None]] = {
    L.PROF: _check_profile,
    L.SPRS: _check_sparsity,
}
_SURPLUS = {L.PROF: "profile-layers", L.SPRS: "sparsity-layers", L.DRFT: "draft-type"}


def _require(fine: bool, code: str, message: str) -> None:
    if not fine:
        raise DocumentError(code, message)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0
