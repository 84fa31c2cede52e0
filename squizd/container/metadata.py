"""What the META section says: model, recipe, provenance, licence, siblings (spec, "Metadata").

`spec/metadata.schema.json` says the same in JSON Schema; a test compares the two. Members that are not
listed here are kept and mean nothing to a reader.
"""

from __future__ import annotations

import re
from typing import Any

from . import restricted
from .layout import MAX_FILE_NAME_LENGTH, MAX_JSON_SIZE, Bytes
from .restricted import DocumentError

MetadataError = DocumentError

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?<!\.)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def encode(metadata: dict[str, Any]) -> bytes:
    """Canonical bytes of `metadata`; raises MetadataError if a reader would reject them."""
    data = restricted.encode(metadata)
    if len(data) > MAX_JSON_SIZE:
        raise MetadataError("section-limit", f"metadata takes {len(data)} bytes, at most {MAX_JSON_SIZE}")
    decode(data)
    return data


def decode(data: Bytes) -> dict[str, Any]:
    """Parse and check the bytes of META; raises MetadataError for the first broken rule."""
    value: dict[str, Any] = restricted.decode(data)
    _check_types(value)
    _check_set(value)
    return value


def is_file_name(name: str) -> bool:
    """Whether `name` is bare and safe in every file system: no path, no leading or trailing dot."""
    return len(name) <= MAX_FILE_NAME_LENGTH and _FILE_NAME.fullmatch(name) is not None


def is_sha256(text: Any) -> bool:
    """Whether `text` is a SHA-256 in lower-case hexadecimal."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


# -- types -----------------------------------------------------------------------------------------------


def _check_types(value: Any) -> None:
    _object(value, "metadata")
    for member in ("model", "recipe", "provenance"):
        _object(value.get(member), member)
    config = value["model"].get("config")
    _object(config, "model.config")
    _text(config.get("model_type"), "model.config.model_type")
    _texts(value, "", "licence", "description")
    _texts(value["recipe"], "recipe.", "name", "quantizer")
    provenance = value["provenance"]
    _texts(provenance, "provenance.", "tool", "version")
    source = provenance.get("source", {})
    _object(source, "provenance.source")
    _texts(source, "provenance.source.", "repo", "revision")
    for i, file in enumerate(_list(source.get("files", []), "provenance.source.files")):
        _source_file(file, f"provenance.source.files[{i}]")
    calibration = provenance.get("calibration", {})
    _object(calibration, "provenance.calibration")
    if "sha256" in calibration and not is_sha256(calibration["sha256"]):
        _wrong("provenance.calibration.sha256 is not a SHA-256")


def _source_file(file: Any, where: str) -> None:
    _object(file, where)
    _text(file.get("name"), f"{where}.name")
    _count(file.get("size"), f"{where}.size")
    if not is_sha256(file.get("sha256")):
        _wrong(f"{where}.sha256 is not a SHA-256")


def _check_set(value: dict[str, Any]) -> None:
    """A member of a sharded set says which one it is; the first lists the others in order."""
    siblings = _list(value.get("siblings", []), "siblings")
    for i, sibling in enumerate(siblings):
        where = f"siblings[{i}]"
        _object(sibling, where)
        _text(sibling.get("name"), f"{where}.name")
        _count(sibling.get("size"), f"{where}.size")
        if not is_sha256(sibling.get("file_id")):
            _wrong(f"{where}.file_id is not a SHA-256")
    member = value.get("set", {"index": 0, "count": 1})
    _object(member, "set")
    _count(member.get("index"), "set.index")
    _count(member.get("count"), "set.count")
    for i, sibling in enumerate(siblings):
        if not is_file_name(sibling["name"]):
            raise MetadataError("sibling-name", f"siblings[{i}].name {sibling['name'][:80]!a} is not bare")
    index, count = member["index"], member["count"]
    names = {sibling["name"].lower() for sibling in siblings}
    if index >= count or len(siblings) != (count - 1 if index == 0 else 0) or len(names) != len(siblings):
        raise MetadataError("metadata-set", f"member {index} of {count} lists {len(siblings)} siblings")


def _wrong(message: str) -> None:
    raise MetadataError("metadata-type", message)


def _object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        _wrong(f"{where} is not an object")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _wrong(f"{where} is not an array")
    checked: list[Any] = value
    return checked


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        _wrong(f"{where} is not a string")


def _texts(holder: dict[str, Any], prefix: str, *members: str) -> None:
    for member in members:
        if member in holder:
            _text(holder[member], prefix + member)


def _count(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _wrong(f"{where} is not an integer of at least 0")
