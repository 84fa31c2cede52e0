"""What a file's PROF appendix says about its routing (spec, "Appendices"), as far as paging uses it. No MLX.

Here `hits_by_slots` is what the pager's own policy would have hit. Without it hits are estimated from counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ..container import appendices
from ..container.layout import PROF
from ..container.reader import File
from ..container.restricted import DocumentError
from ..errors import FormatError
from .policy import ONE, settled

Points = tuple[tuple[int, int], ...]
MEMBER = "hits_by_slots"


@dataclass(frozen=True)
class LayerProfile:
    """One expert module: tokens routed to each expert, and `hits_by_slots` if the file has it."""

    counts: tuple[int, ...]
    measured: Points = ()

    @property
    def lookups(self) -> int:
        """Experts that were asked for: hits are a part of these."""
        return sum(self.counts)

    def curve(self) -> Points:
        """(slots, hits): as measured, else what the most used experts would hit if nothing else were ever resident."""
        if self.measured:
            return self.measured
        return tuple(enumerate(accumulate(sorted(self.counts, reverse=True), initial=0)))

    def hits(self, slots: int) -> float:
        """Expected share of needed experts that are resident with `slots` slots; 0 to 1."""
        points = ((0, 0), *self.curve())
        if slots >= len(self.counts) or not self.lookups:  # nothing is missed: a profile begins with empty slots
            return 1.0
        for (a, low), (b, high) in pairwise(points):
            if a <= slots <= b and a < b:
                return (low + (high - low) * (slots - a) / (b - a)) / self.lookups
        return points[-1][1] / self.lookups

    def busiest(self, count: int) -> list[int]:
        """The `count` most used experts, in the order of their numbers: that of the file. None that was never used."""
        order = sorted(range(len(self.counts)), key=lambda e: (-self.counts[e], e))
        return sorted(e for e in order[:count] if self.counts[e])

    def prior(self, tokens: int) -> list[int]:
        """What each expert counts for `policy.Recall` after a long text like the profile's."""
        return [settled(count * ONE // max(tokens, 1)) for count in self.counts]


@dataclass(frozen=True)
class Profile:
    """One LayerProfile for each module, in the order of MOEL, from a text of `tokens` tokens."""

    tokens: int
    layers: tuple[LayerProfile, ...]


def read_profile(file: File) -> Profile | None:
    """The profile in an open file; None without PROF, or with one of a version that is not known.

    Raises ReadError where the bytes cannot be had, FormatError where they are no profile of this file.
    """
    lines = file.appendix(PROF)
    if not lines:
        return None
    try:
        header, *layers = lines
        return _profile(header, layers, file) if header["version"] == appendices.VERSION else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        offset = next(s.offset for s in file.sections if s.type == PROF)
        reason = str(error) if isinstance(error, DocumentError) else repr(error)
        code = error.code if isinstance(error, DocumentError) else "profile-type"
        raise FormatError(file.path, code, offset, f"its profile cannot be read: {reason}") from error


def _profile(header: dict[str, Any], lines: Sequence[dict[str, Any]], file: File) -> Profile:
    layers, tokens = [], header["tokens"]
    if type(tokens) is not int or tokens < 0:
        raise DocumentError("profile-type", "tokens")
    for layer, line in zip(file.moe_layers, lines, strict=True):
        counts = tuple(line["counts"])
        if len(counts) != layer.expert_count or not all(type(n) is int and n >= 0 for n in counts):
            raise DocumentError("profile-layers", f"layer {layer.layer}: {len(counts)} counts")
        if max(counts) > tokens:
            raise DocumentError("profile-count", f"layer {layer.layer}: {max(counts)} of {tokens} tokens")
        layers.append(LayerProfile(counts, _points(line.get(MEMBER), layer.expert_count, sum(counts))))
    return Profile(tokens, tuple(layers))


def _points(value: Any, experts: int, lookups: int) -> Points:
    """`hits_by_slots`, or nothing if it is not what section 17 says: then it counts as absent."""
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        return ()
    points = tuple((p[0], p[1]) for p in value)
    fine = all(type(n) is int for p in points for n in p)
    fine = fine and all(a < b and x <= y for (a, x), (b, y) in pairwise(points))
    fine = fine and bool(points) and points[0][0] > 0 and points[-1][0] <= experts
    return points if fine and points[0][1] >= 0 and points[-1][1] <= lookups else ()
