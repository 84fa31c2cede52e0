"""Second ways to break a rule, and files with two faults: which is found first tells the order of the checks.

A file is called after the code that comes first, a dot, and what is special about it: `CODE.MORE.squizd`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable

from . import valid, zstd
from .build import Draft, Spec
from .invalid import FAULTS, DraftChange, Fault, appendix
from .valid import lines


def twice(name: str, change: str, *changes: DraftChange, base: str = "toy", deep: bool = False) -> None:
    """A file with changes that are made before digests are computed."""

    def function(d: Draft) -> None:
        for each in changes:
            each(d)

    FAULTS[name] = Fault(base, change, draft=function, deep=deep)


def row(kind: str, place: int, **members: int) -> DraftChange:
    """Other members of an index entry."""
    return lambda d: d.head[kind][place].update(members)


def record(kind: str, place: int, **members: int) -> DraftChange:
    """Other members of the record of an index entry."""
    return lambda d: d.head[kind][place]["record"].update(members)


def section(kind: str, **members: int | bytes | None) -> DraftChange:
    """Other members of a directory entry."""
    return lambda d: d.section(kind).update(members)


# -- parts that are absent -------------------------------------------------------------------------------------

twice("part-offset.absent", "TENS entry 1: scales of no bytes at 64", row("TENS", 1, scales_offset=64))
twice("part-range.absent", "TENS entry 1: biases of no bytes past 2^36", row("TENS", 1, biases_offset=2**36 + 64))
twice(
    "part-size.absent", "TENS entry 1 is raw and has 4 bytes of scales at 2^64 - 64",
    row("TENS", 1, scales_offset=2**64 - 64, scales_size=4),
)  # fmt: skip

# -- two faults in one stage -----------------------------------------------------------------------------------

twice(
    "header-size.and-reserved", "header: header_size is 255, the last reserved byte is 1",
    lambda d: d.header.update(header_size=255, reserved=b"\0" * 167 + b"\1"), base="least",
)  # fmt: skip
twice(
    "section-reserved.then-flags", "META has a reserved byte, STRS a second flag",
    section("META", reserved1=b"\1"), section("STRS", flags=3),
)  # fmt: skip
twice(
    "section-missing.and-order", "RESD is called resd, TENS and STRS have each other's type",
    section("RESD", type=b"resd", flags=0, digest=None),
    lambda d: [d.directory[i].update(type=kind) for i, kind in ((1, b"TENS"), (2, b"STRS"))], base="dense",
)  # fmt: skip
twice(
    "section-digest.then-padding", "the digest of META is wrong, the last byte before TENS is 01",
    section("META", digest=1), lambda d: d.data.update({d.head_at["TENS"] - 1: b"\1"}),
)  # fmt: skip
twice(
    "index-reserved.then-tensor-mode", "FILE entry 0 has a reserved byte, TENS entry 0 an unknown mode",
    row("FILE", 0, reserved=1), row("TENS", 0, mode=9),
)  # fmt: skip
twice(
    "part-offset.then-tensor-role", "TENS entry 0 has biases at 64, entry 1 the role of experts",
    row("TENS", 0, biases_offset=64), row("TENS", 1, role=5),
)  # fmt: skip
twice(
    "record-size.then-codec", "EXPI entry 6 has a raw_size of 1, entry 7 an unknown codec",
    record("EXPI", 6, raw_size=1), record("EXPI", 7, codec=2),
)  # fmt: skip
twice(
    "expert-range.then-layer", "EXPI entry 5 is expert 4 of four, entry 7 is of an unknown layer",
    row("EXPI", 5, expert=4), row("EXPI", 7, layer=9),
)  # fmt: skip

# -- payload ---------------------------------------------------------------------------------------------------


def _inside(d: Draft) -> None:
    """A byte between scales and biases of the embedding, under the record's digest."""
    at = d.head["TENS"][0]["record"]["offset"]
    d.data[at] = d.data[at][:100] + b"\1" + d.data[at][101:]


def _behind(d: Draft) -> None:
    """The last byte before the second resident."""
    d.data[d.head["TENS"][1]["record"]["offset"] - 1] = b"\1"


twice("padding-nonzero.parts", "byte 100 of the first resident's record is 01", _inside, deep=True)
twice("padding-nonzero.records", "the last byte before the second resident's record is 01", _behind, deep=True)


def _bias(s: Spec) -> None:
    s.residents[0][0].biases = struct.pack("<2f", 1, math.nan)


FAULTS["bias-not-finite.then-record-digest"] = Fault(
    "toy", "a bias of the first resident is not a number, the digest of the first expert is wrong",
    spec=_bias, draft=record("EXPI", 0, digest=1), deep=True,
)  # fmt: skip

# -- appendices ------------------------------------------------------------------------------------------------

Documents = Callable[[list[dict]], list]  # the lines of an appendix, to what they become


def rewritten(name: str, kind: str, change: str, function: Documents, base: str = "appendices") -> None:
    """A file with other lines in an appendix; None is the line `null`."""

    def content(s: Spec) -> bytes:
        found = next(a for a in s.appendices if a.type == kind)
        return lines(*function([json.loads(line) for line in found.content.splitlines()]))

    appendix(name, kind, change, content, base)


twice("section-digest.appendix", "the digest of PROF is wrong", section("PROF", digest=1), base="appendices", deep=True)
rewritten("draft-type.second-line", "DRFT", "a second line", lambda some: [*some, {}])
rewritten("draft-type.null-line", "DRFT", "a second line that is null", lambda some: [*some, None])
rewritten("profile-layers.null-line", "PROF", "a line more that is null", lambda some: [*some, None])
rewritten("sparsity-type.null-line", "SPRS", "the line of the last layer is null", lambda some: [*some[:2], None])
rewritten(
    "draft-hidden.and-second-line", "DRFT", "64, the model has 32; a second line",
    lambda some: [some[0] | {"hidden": 64}, {}],
)  # fmt: skip
rewritten(
    "profile-mass.then-count", "PROF", "gate mass of the first layer is negative, so is a count of the second",
    lambda some: [some[0], some[1] | {"gate_mass": [-1, 20, 0, 1]}, some[2] | {"counts": [50, 50, 50, -1]}],
)  # fmt: skip
rewritten(
    "profile-count.and-mass", "PROF", "the first gate mass is negative, so is the third count",
    lambda some: [some[0], some[1] | {"gate_mass": [-1, 20, 0, 1], "counts": [60, 40, -1, 100]}, some[2]],
)  # fmt: skip


def _two_experts(some: list[dict]) -> list:
    some[1]["experts"][0]["digest"], some[1]["experts"][1]["clusters"] = "0" * 16, 0
    return some


rewritten("sparsity-digest.then-clusters", "SPRS", "expert 0 has a wrong digest, expert 1 no clusters", _two_experts)


def _wider(s: Spec) -> None:
    """All experts of the first module get the layout whose up_proj and fc1 differ."""
    for expert in s.layers[0][2]:
        expert.layout, expert.tensors = 1, s.layouts[1]
    next(a for a in s.appendices if a.type == "SPRS").content = valid.clusters(s, 3, 7)


FAULTS["sparsity-width.two-widths"] = Fault(
    "two-forms", "SPRS: the width is that of up_proj, fc1 has another", spec=_wider, deep=True
)


def _second_frame(s: Spec) -> None:
    s.appendices[0].coded.frame += zstd.frame(b"{}\n")


FAULTS["zstd-trailing.appendix"] = Fault("appendices", "PROF: a second frame", spec=_second_frame, deep=True)
