"""Restricted JSON: the only text format inside a file (spec, "Restricted JSON").

Strict where `json.loads` is lenient: bounded size, depth and count, unique keys, numbers that every
language reads alike. Writing is canonical: sorted keys, no spaces, ASCII only, so equal values are
equal bytes. Knows nothing about what a document means (`metadata`, `appendices`).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .layout import MAX_JSON_DEPTH, MAX_JSON_TOKENS, MAX_SAFE_INTEGER, Bytes

_STRING = re.compile(rb'"[^"]*"?')  # once escapes are gone; an open string reaches to the end
_BRACKET = re.compile(rb"[\[\]{}]")


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
    data = bytes(data)
    try:
        text = data.decode("utf-8")
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


def _check_structure(data: bytes) -> None:
    """Count commas and brackets outside strings. Linear, before anything is built from the document."""
    bare = _STRING.sub(b"", data.replace(b"\\\\", b"").replace(b'\\"', b""))
    tokens = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if tokens > MAX_JSON_TOKENS:
        raise DocumentError("json-tokens", f"{tokens} commas and opening brackets")
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise DocumentError("json-depth", f"the document nests deeper than {MAX_JSON_DEPTH}")


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
        if "\0" in value or not (value.isascii() or _has_utf8(value)):
            raise DocumentError("json-string", "a string holds U+0000 or half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)


def _has_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
