"""What the PROF, SPRS and DRFT appendices say (spec, "Appendices").

An appendix is JSON lines: the first names it, each further one speaks of one layer, so neither writer
nor reader holds more than a line. `check` is the deep validator's; `read_lines` is for whoever uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

from . import layout as L
from . import restricted
from .metadata import is_sha256
from .parse import Contents
from .restricted import DocumentError

VERSION = 1
NAMES = {L.PROF: "profile", L.SPRS: "sparsity", L.DRFT: "draft"}

_DIGEST = re.compile("[0-9a-f]{16}")  # XXH64
Document = dict[str, Any]
Lines = Iterator[Document]


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


def check(kind: bytes, lines: Lines, contents: Contents) -> None:
    """Raises DocumentError for the first rule that an appendix of type PROF, SPRS or DRFT breaks."""
    header = next(lines, None)
    if not isinstance(header, dict) or header.get("appendix") != NAMES[kind] or not _is_count(header.get("version")):
        raise DocumentError("appendix-header", f"the first line is no header of a {NAMES[kind]}")
    if header["version"] == VERSION:
        _CHECKS[kind](header, lines, contents)
    for _ in lines:  # lines that mean nothing to this version must still be lines
        pass


# -- PROF ------------------------------------------------------------------------------------------------


def _check_profile(header: Document, lines: Lines, contents: Contents) -> None:
    def right(fine: bool, message: str) -> None:
        _require(fine, "profile-type", message)

    tokens = header.get("tokens")
    right(_is_count(tokens) and is_sha256(header.get("text_sha256")), "tokens or text_sha256")
    for layer in contents.moe_layers:
        line, where = next(lines, None), f"layer {layer.layer}"
        _require(line is not None, "profile-layers", f"no line for {where}")
        right(isinstance(line, dict), f"{where}: no object")
        assert line is not None
        counts, mass = line.get("counts"), line.get("gate_mass")
        right(_is_count(line.get("layer")), f"{where}: layer")
        right(isinstance(counts, list) and all(_is_integer(n) for n in counts), f"{where}: counts")
        right(isinstance(mass, list) and all(_is_number(n) for n in mass), f"{where}: gate_mass")
        pairs = line.get("coactivation", [])
        right(isinstance(pairs, list) and all(_is_triple(p) for p in pairs), f"{where}: coactivation")
        assert isinstance(counts, list)
        assert isinstance(mass, list)
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
    _require(next(lines, None) is None, "profile-layers", "more lines than layers")


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_integer(n) for n in value)


# -- SPRS ------------------------------------------------------------------------------------------------


def _check_sparsity(header: Document, lines: Lines, contents: Contents) -> None:
    first = 0
    for layer in contents.moe_layers:
        line, where = next(lines, None), f"layer {layer.layer}"
        _require(line is not None, "sparsity-layers", f"no line for {where}")
        _require(isinstance(line, dict), "sparsity-type", f"{where}: no object")
        assert line is not None
        experts: list[Document] = line["experts"] if isinstance(line.get("experts"), list) else [{}]
        fine = _is_count(line.get("layer")) and _is_count(line.get("width"))
        _require(fine and all(_is_sparse_expert(e) for e in experts), "sparsity-type", f"{where}: types")
        matches = line["layer"] == layer.layer and len(experts) == layer.expert_count
        _require(matches, "sparsity-layers", f"{where}: the line is of layer {line['layer']}, {len(experts)} experts")
        for i, expert in enumerate(experts):
            record = contents.experts[first + i]["record"]
            tensors = contents.layouts[int(record["layout"])].tensors
            _check_expert(expert, line["width"], tensors, int(record["digest"]), f"{where} expert {i}")
        first += layer.expert_count
    _require(next(lines, None) is None, "sparsity-layers", "more lines than layers")


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


def _check_expert(e: Document, width: int, tensors: tuple[L.Tensor, ...], digest: int, where: str) -> None:
    rows = {t.shape[0] for t in tensors if t.name in ("up_proj.weight", "fc1.weight")}
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


def _check_draft(header: Document, lines: Lines, contents: Contents) -> None:
    layers, tensors = header.get("source_layers"), header.get("tensors")
    fine = _is_count(header.get("hidden")) and isinstance(header.get("kind"), str)
    fine = fine and isinstance(layers, list) and all(_is_integer(n) for n in layers)
    fine = fine and isinstance(tensors, list) and all(_is_draft_tensor(t) for t in tensors)
    _require(fine, "draft-type", "types")
    assert isinstance(layers, list)
    assert isinstance(tensors, list)
    config = contents.metadata["model"]["config"]
    hidden, count = config.get("hidden_size"), config.get("num_hidden_layers")
    agrees = not _is_integer(hidden) or hidden == header["hidden"]
    _require(agrees, "draft-hidden", f"hidden {header['hidden']}, the model has {hidden}")
    ascending = all(a < b for a, b in pairwise(layers))
    below = layers and layers[0] >= 0 and (not _is_integer(count) or layers[-1] < count)
    _require(bool(ascending and below), "draft-source-layer", f"source layers {layers[:8]} of {count}")
    stored = draft_tensors(contents)
    _require([t["name"] for t in tensors] == list(stored), "draft-tensors", "not the tensors of role draft")
    for t in tensors:
        _require(t["digest"] == f"{stored[t['name']]:016x}", "draft-digest", f"{L.printable(t['name'])}: digest")
    _require(next(lines, None) is None, "draft-type", "more than one line")


def draft_tensors(contents: Contents) -> dict[str, int]:
    """Names and record digests of the resident tensors of role draft, in file order."""
    return {name: record.digest for name, (tensor, record) in contents.residents.items() if tensor.role == "draft"}


def _is_draft_tensor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and _is_digest(value.get("digest"))


# -- shared ----------------------------------------------------------------------------------------------

_CHECKS: dict[bytes, Callable[[Document, Lines, Contents], None]] = {
    L.PROF: _check_profile,
    L.SPRS: _check_sparsity,
    L.DRFT: _check_draft,
}


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
