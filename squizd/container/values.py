"""Which decoded bytes make sense: zero padding, finite scales, nothing that overflows (spec, "Values").

A `Scan` sees the bytes of one record, or of many records of one layout at once, in pieces of any number,
and keeps only extremes: memory does not grow with the record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .layout import LARGEST, LARGEST_E8M0, Tensor

Block = npt.NDArray[np.uint8]  # [records, bytes]
_WIDTHS = {"f32": 4, "f16": 2, "bf16": 2}
_INFINITY = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
_MANTISSA = {"f32": 23, "f16": 10, "bf16": 7}  # bits
_E4M3_NAN = 0x7F
_E8M0_NAN = 0xFF


class _Span(NamedTuple):
    """Bytes start to end of a record whose largest magnitude is wanted: `width` 0 means padding.

    A magnitude up to `harmless` breaks no rule, whatever the other parts hold.
    """

    start: int
    end: int
    width: int
    signed: bool
    harmless: int


class Scan:
    """The extremes of the parts that have rules, for a record that holds `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._spans: list[_Span] = []
        self._at: dict[tuple[int, str], int] = {}  # (tensor, part) -> span
        end = 0
        for i, tensor in enumerate(tensors):
            for part, offset, size in tensor.parts:
                if offset > end:
                    self._spans.append(_Span(end, offset, 0, False, 0))
                end = offset + size
                width, signed, harmless = _number(tensor, part)
                if width:
                    self._at[i, part] = len(self._spans)
                    self._spans.append(_Span(offset, end, width, signed, harmless))
        self._extremes = [0] * len(self._spans)
        self._merged: list[_Span] = []
        for span in self._spans:
            if self._merged and self._merged[-1][1:] == (span.start, *span[2:]):
                span = span._replace(start=self._merged.pop().start)
            self._merged.append(span)

    def clear(self) -> None:
        """Forget what was seen."""
        self._extremes = [0] * len(self._spans)

    def harmless(self, block: Block) -> bool:
        """Whether a quick look at whole records, one a row, shows that they break no rule."""
        return all(_extreme(block[:, s.start : s.end], s) <= s.harmless for s in self._merged)

    def see(self, block: Block, position: int = 0) -> None:
        """Take in bytes `position` and on of each record, one record a row. `position` is a multiple of 64."""
        stop = position + block.shape[1]
        for i, span in enumerate(self._spans):
            if span.end <= position or span.start >= stop:
                continue
            piece = block[:, max(span.start - position, 0) : span.end - position]
            self._extremes[i] = max(self._extremes[i], _extreme(piece, span))

    def faults(self) -> Iterator[tuple[str, int, str]]:
        """(code, offset in the record, what) of every rule that the bytes seen break, in the spec's order."""
        for span, extreme in zip(self._spans, self._extremes, strict=True):
            if span.width == 0 and extreme:
                yield "padding-nonzero", span.start, "padding is not zero"
        for i, tensor in enumerate(self._tensors):
            code, part = self._broken(i, tensor)
            if code:
                yield code, getattr(tensor, part)[0], f"{tensor.label}: {part}"

    def _broken(self, i: int, tensor: Tensor) -> tuple[str, str]:
        """The first rule that tensor `i` breaks, and in which part; empty strings if none."""
        encoding = tensor.encoding
        if encoding.mode == "affine":
            scale, bias = self._extreme_of(i, "scales"), self._extreme_of(i, "biases")
            if scale >= _INFINITY[encoding.dtype]:
                return "scale-not-finite", "scales"
            if bias >= _INFINITY[encoding.dtype]:
                return "bias-not-finite", "biases"
            largest = _as_float(scale, encoding.dtype) * ((1 << encoding.bits) - 1) + _as_float(bias, encoding.dtype)
            return ("value-overflow", "scales") if largest > LARGEST[encoding.dtype] else ("", "")
        if encoding.mode in LARGEST_E8M0:
            exponent = self._extreme_of(i, "scales")
            if exponent == _E8M0_NAN:
                return "e8m0-nan", "scales"
            if encoding.mode == "mxfp8" and self._extreme_of(i, "codes") == _E4M3_NAN:
                return "e4m3-nan", "codes"
            return ("value-overflow", "scales") if exponent > LARGEST_E8M0[encoding.mode][encoding.dtype] else ("", "")
        if encoding.mode == "nvfp4" and self._extreme_of(i, "scales") == _E4M3_NAN:
            return "e4m3-nan", "scales"
        return "", ""

    def _extreme_of(self, i: int, part: str) -> int:
        return self._extremes[self._at[i, part]]


def _number(tensor: Tensor, part: str) -> tuple[int, bool, int]:
    """(bytes of a number, whether it has a sign, harmless magnitude) of a part whose values have rules; or zeros."""
    mode, dtype = tensor.encoding.mode, tensor.encoding.dtype
    if mode == "affine" and part != "codes":
        # 2^-10 of what overflows: times any code of up to 8 bits, plus a bias, it does not
        return _WIDTHS[dtype], True, _INFINITY[dtype] - (10 << _MANTISSA[dtype])
    if mode in LARGEST_E8M0 and part == "scales":
        return 1, False, LARGEST_E8M0[mode][dtype]
    if (mode, part) in (("mxfp8", "codes"), ("nvfp4", "scales")):
        return 1, True, _E4M3_NAN - 1
    return 0, False, 0


def _extreme(piece: Block, span: _Span) -> int:
    """The largest magnitude of a piece, as the bits of the number without its sign."""
    width = span.width or 1
    largest = int(piece.view(f"<u{width}").max())
    if not span.signed:
        return largest
    mask = (1 << 8 * width - 1) - 1
    positive = int(piece.view(f"<i{width}").max())
    return max(positive, largest & mask if largest > mask else 0)


def _as_float(bits: int, dtype: str) -> float:
    """The positive number with these bits."""
    if dtype == "f16":
        return float(struct.unpack("<e", bits.to_bytes(2, "little"))[0])
    return float(struct.unpack("<f", (bits << 16 if dtype == "bf16" else bits).to_bytes(4, "little"))[0])
