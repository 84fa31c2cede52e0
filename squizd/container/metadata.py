"""The restricted JSON of the META section (spec, "Metadata").

Strict where `json.loads` is lenient: unique keys, bounded depth, numbers that every language reads
alike. Writing is canonical: sorted keys, no spaces, ASCII only, so equal metadata is equal bytes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .layout import MAX_METADATA_DEPTH, MAX_METADATA_SIZE, MAX_SAFE_INTEGER

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class MetadataError(ValueError):
    """Metadata breaks the rule `code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode(metadata: dict[str, Any]) -> bytes:
    """Canonical bytes of `metadata`; raises MetadataError if they could not be read back."""
    try:
        data = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except ValueError as error:
        raise MetadataError("metadata-number", str(error)) from error
    decode(data)
    return data


def decode(data: bytes) -> dict[str, Any]:
    """Parse and check the bytes of META; raises MetadataError for the first broken rule."""
    if len(data) > MAX_METADATA_SIZE:
        raise MetadataError("metadata-size", f"metadata has {len(data)} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetadataError("metadata-utf8", f"metadata is not UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise MetadataError("metadata-utf8", "metadata starts with a byte order mark")
    _check_depth(data)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise MetadataError("metadata-json", f"metadata is not JSON: {error.msg} at character {error.pos}") from error
    _check_schema(value)
    _check_text(value)
    checked: dict[str, Any] = value
    return checked


def _check_depth(data: bytes) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_METADATA_DEPTH:
            raise MetadataError("metadata-depth", f"metadata nests deeper than {MAX_METADATA_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MetadataError("metadata-duplicate-key", f"key {twice!r} occurs twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > 17 or abs(int(digits)) > MAX_SAFE_INTEGER:
        raise MetadataError("metadata-number", f"integer {digits[:24]} is beyond 2^53")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MetadataError("metadata-number", f"number {digits[:24]} overflows")
    return value


def _constant(name: str) -> float:
    raise MetadataError("metadata-json", f"{name} is not JSON")


def _check_text(value: Any) -> None:
    """No lone surrogates: they cannot be written as UTF-8."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise MetadataError("metadata-utf8", "a string holds a lone surrogate")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _check_schema(value: Any) -> None:
    _require(value, dict, "metadata")
    for member in ("model", "recipe", "provenance"):
        _require(value.get(member), dict, member)
    config = value["model"].get("config")
    _require(config, dict, "model.config")
    _require(config.get("model_type"), str, "model.config.model_type")
    for member in ("licence", "description"):
        if member in value:
            _require(value[member], str, member)


def _require(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise MetadataError("metadata-type", f"{where} is not {'an object' if kind is dict else 'a string'}")
