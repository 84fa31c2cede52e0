"""Restricted JSON: the only text format inside a file (spec, "Restricted JSON").

Strict where `json.loads` is lenient: bounded size, depth and count, unique keys, numbers that every
language reads alike. Writing is canonical: sorted keys, no spaces, ASCII only, so equal values are
equal bytes. Knows nothing about what a document means (`metadata`, `appendices`).
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any

from .layout import MAX_JSON_DEPTH, MAX_JSON_TOKENS, MAX_SAFE_INTEGER, Bytes

_OTHER = bytes(set(range(256)) - set(b'",[]{}'))  # what the structure scan does not look at
_STEPS = [(code in b"[{") - (code in b"]}") for code in range(256)]
_WINDOW = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")


class DocumentError(ValueError):
    """A document breaks the rule `code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode(value: Any) -> bytes:
    """Canonical bytes of `value`; raises DocumentError if they could not be read back."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise DocumentError("json-number", str(error)) from error
    except (TypeError, RecursionError) as error:
        raise DocumentError("json-syntax", f"no JSON value: {error}") from error
    data = text.encode("ascii")
    decode(data)
    return data


def decode(data: Bytes) -> Any:
    """The value of one document of at most MAX_JSON_SIZE bytes, which is the caller's to check.

    Raises DocumentError for the first broken rule, in the order of the spec.
    """
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError("json-utf8", f"not UTF-8 at byte {error.start} of the document") from error
    if text.startswith("\ufeff"):
        raise DocumentError("json-utf8", "the document starts with a byte order mark")
    _check_structure(data)
    numbers = _Numbers()
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs) and not twice:
            seen = set[str]()
            twice.append(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return result

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=numbers.integer,
            parse_float=numbers.real,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise DocumentError("json-syntax", f"not JSON: {error.msg} at character {error.pos}") from error
    if numbers.bad:
        raise DocumentError("json-number", f"number {numbers.bad} is beyond 2^53, or not finite")
    if twice:
        raise DocumentError("json-duplicate-key", f"key {twice[0][:80]!a} occurs twice in an object")
    _check_strings(value)
    return value


def _check_structure(data: Bytes) -> None:
    """Count commas and brackets outside strings. Linear, before anything is built from the document."""
    bare = bytes(data).replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHER)
    tokens, depth, deepest, inside = 0, 0, 0, 0
    for at in range(0, len(bare), _WINDOW):  # all at once would take more memory than the document's objects
        parts = bare[at : at + _WINDOW].split(b'"')
        outside = b"".join(parts[inside::2])
        inside ^= len(parts) - 1 & 1
        tokens += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        levels = [*accumulate(map(_STEPS.__getitem__, outside), initial=depth)]
        depth, deepest = levels[-1], max(deepest, max(levels))
    if tokens > MAX_JSON_TOKENS:
        raise DocumentError("json-tokens", f"{tokens} commas and opening brackets")
    if deepest > MAX_JSON_DEPTH:
        raise DocumentError("json-depth", f"the document nests {deepest} deep, at most {MAX_JSON_DEPTH}")


class _Numbers:
    """Converts numbers, and remembers the first that breaks the rules."""

    def __init__(self) -> None:
        self.bad = ""

    def integer(self, digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > MAX_SAFE_INTEGER:
            self.bad = self.bad or digits[:24]
            return 0
        return int(digits)

    def real(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self.bad = self.bad or digits[:24]
        return value


def _constant(name: str) -> float:
    raise DocumentError("json-syntax", f"not JSON: {name}")


def _check_strings(value: Any) -> None:
    """No lone surrogate and no U+0000: not every language can hold them."""
    if isinstance(value, str):
        if "\0" in value or not (value.isascii() or _SURROGATE.search(value) is None):
            raise DocumentError("json-string", "a string holds U+0000 or half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
