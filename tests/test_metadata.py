"""Restricted JSON and the metadata on top of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squizd.container import appendices, metadata, restricted
from squizd.container import layout as L
from squizd.container.restricted import DocumentError

LEAST: dict[str, Any] = {"model": {"config": {"model_type": "m"}}, "recipe": {}, "provenance": {}}


def code_of(data: bytes) -> str:
    """The rule that a document breaks, or an empty string."""
    try:
        restricted.decode(data)
    except DocumentError as error:
        return error.code if str(error).isprintable() else "unprintable"
    return ""


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"x"])), st.integers(1, 5))
def test_structure_scan_is_what_the_spec_says(pieces: list[bytes], window: int) -> None:
    """Byte by byte: whatever the size of the pieces in which it is done."""
    data, tokens, depth, deepest, inside = b"".join(pieces), 0, 0, 0, False
    for i, byte in enumerate(data):
        before = data[:i]
        if byte == ord('"') and (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            inside = not inside
        elif not inside:
            tokens += byte in b",[{"
            depth += (byte in b"[{") - (byte in b"]}")
            deepest = max(deepest, depth)
    expected = "json-tokens" if tokens > 6 else "json-depth" if deepest > 3 else ""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_WINDOW", window), ("MAX_JSON_TOKENS", 6), ("MAX_JSON_DEPTH", 3)):
            patch.setattr(restricted, name, value)
        try:
            restricted._check_structure(data)
            found = ""
        except DocumentError as error:
            found = error.code
    assert found == expected


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "json-syntax"),
        (b"\xff", "json-utf8"),
        (b"\xed\xa0\x80", "json-utf8"),  # a surrogate as UTF-8
        (b"\xc0\x80", "json-utf8"),  # overlong
        (b"\xef\xbb\xbf{}", "json-utf8"),
        (b"{} x", "json-syntax"),
        (b"{}{}", "json-syntax"),
        (b"{}\0", "json-syntax"),
        (b"[1,]", "json-syntax"),
        (b"{'a':1}", "json-syntax"),
        (b'{"a":01}', "json-syntax"),
        (b"[.5]", "json-syntax"),
        (b"[+1]", "json-syntax"),
        (b"[0x10]", "json-syntax"),
        (b"[NaN]", "json-syntax"),
        (b"[-Infinity]", "json-syntax"),
        (b'["\n"]', "json-syntax"),
        (b'["\\x"]', "json-syntax"),
        (b'["', "json-syntax"),
        (b'["\\', "json-syntax"),
        (b"// no\n{}", "json-syntax"),
        (b"\xc2\xa0{}", "json-syntax"),  # white space of Unicode, not of JSON
        (b"\x0b{}", "json-syntax"),
        (b"9007199254740991", ""),
        (b"-9007199254740991", ""),
        (b"9007199254740992", "json-number"),
        (b"-9007199254740992", "json-number"),
        (b"1" * 5000, "json-number"),
        (b"9007199254740993.0", ""),
        (b"1e308", ""),
        (b"1e309", "json-number"),
        (b"-1e999999999999", "json-number"),
        (b"1e-999999999999", ""),
        (b'{"a":1,"a":1}', "json-duplicate-key"),
        (b'{"a":1,"\\u0061":1}', "json-duplicate-key"),
        (b'{"a":1,"b":{"a":1}}', ""),
        (b'[{"":1,"":1}]', "json-duplicate-key"),
        (b'"\\u0000"', "json-string"),
        (b'{"a\\u0000":1}', "json-string"),
        (b'"\\ud800"', "json-string"),
        (b'"\\udc00\\ud800"', "json-string"),
        (b'"\\ud83d\\ude00"', ""),
        (b"[" * 32 + b"]" * 32, ""),
        (b"[" * 33 + b"]" * 33, "json-depth"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "json-depth"),
        (b'["' + b"[" * 100 + b'"]', ""),
        (b'["\\"' + b"[" * 100 + b'"]', ""),
        (b'["\\\\",' + b"[" * 32 + b"]" * 33, "json-depth"),
        (b"[" + b"0," * 131072 + b"0]", "json-tokens"),
        (b"[" + b"0," * 131071 + b"[]]", "json-tokens"),
        (b"[" + b"0," * 131071 + b"0]", ""),
        (b" \t\r\n[1, 2]\n", ""),
        (b"null", ""),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else value,
)
def test_rules(data: bytes, code: str) -> None:
    assert code_of(data) == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff[" * 40, "json-utf8"),
        (b"[," * 131072, "json-tokens"),  # neither valid nor shallow
        (b"[" * 40 + b",", "json-depth"),
        (b'[1e999,"\\ud800",}', "json-syntax"),
        (b'{"a":1e999,"a":1}', "json-number"),
        (b'{"a":"\\ud800","a":1}', "json-duplicate-key"),
    ],
)
def test_the_first_broken_rule_is_reported(data: bytes, code: str) -> None:
    assert code_of(data) == code


@pytest.mark.parametrize(
    "unit", [b'"', b'\\"', b'"\\', b"\\", b'",', b'"a":', b"\\\\", b'"\\\\"', b"e9", b"-", b"[]", b"\n", b"0.1e"]
)
def test_no_input_takes_long(unit: bytes) -> None:
    """What makes regular expressions and recursive parsers slow, at the largest size."""
    for start in (b"", b'["', b"[1"):
        data = (start + unit * (L.MAX_JSON_SIZE // len(unit)))[: L.MAX_JSON_SIZE]
        began = time.process_time()
        assert code_of(data)
        assert time.process_time() - began < 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:\\ud8001e9.- \n', max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_a_rule(data: bytes) -> None:
    if not code_of(data):
        assert restricted.decode(data) == json.loads(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-L.MAX_SAFE_INTEGER, L.MAX_SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\"\\é", max_size=3), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(values)
def test_what_is_written_is_read(value: Any) -> None:
    data = restricted.encode(value)
    assert restricted.decode(data) == value
    assert data.isascii()
    assert restricted.encode(restricted.decode(data)) == data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1 << 53, {"a": "\0"}, ["\ud800"], {1, 2}, b""])
def test_what_could_not_be_read_is_not_written(value: Any) -> None:
    with pytest.raises(DocumentError):
        restricted.encode(value)


def test_endless_nesting_is_not_written() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DocumentError):
        restricted.encode(deep)
    while deep:
        deep = deep.pop()


def test_metadata_too_long_is_not_written() -> None:
    with pytest.raises(metadata.MetadataError) as caught:
        metadata.encode(LEAST | {"description": "x" * L.MAX_JSON_SIZE})
    assert caught.value.code == "section-limit"


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("tokenizer.json", True), ("_x", True), ("A-b.9", True), ("x" * 128, True), ("x" * 129, False), ("", False),
        (".", False), ("..", False), (".hidden", False), ("a.", False), ("a/b", False), ("a\\b", False), ("C:", False),
        ("-rf", False), ("a b", False), ("a\n", False), ("é", False), ("a\0", False), ("~", False), ("a..b", True),
    ],
)  # fmt: skip
def test_bare_names(name: str, good: bool) -> None:
    assert metadata.is_file_name(name) == good
    sibling = {"name": name, "size": 1, "file_id": "0" * 64}
    document = LEAST | {"set": {"index": 0, "count": 2}, "siblings": [sibling]}
    try:
        metadata.encode(document)
        code = ""
    except metadata.MetadataError as error:
        code = error.code
    assert code == ("" if good else "json-string" if "\0" in name else "sibling-name")


@pytest.mark.parametrize(
    ("member", "names", "good"),
    [
        ({"index": 0, "count": 1}, [], True), ({"index": 0, "count": 3}, ["b", "c"], True),
        ({"index": 1, "count": 3}, [], True), ({"index": 2, "count": 3}, ["a", "b"], False),
        ({"index": 3, "count": 3}, [], False), ({"index": 0, "count": 0}, [], False),
        ({"index": 0, "count": 3}, ["b"], False), ({"index": 0, "count": 3}, ["b", "B"], False),
        (None, ["b"], False), (None, [], True),
    ],
)  # fmt: skip
def test_sets(member: dict[str, int] | None, names: list[str], good: bool) -> None:
    document = LEAST | {"siblings": [{"name": name, "size": 1, "file_id": "0" * 64} for name in names]}
    if member is not None:
        document["set"] = member
    if good:
        metadata.encode(document)
        return
    with pytest.raises(metadata.MetadataError) as caught:
        metadata.encode(document)
    assert caught.value.code == "metadata-set"


# -- lines -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2), max_size=5), st.integers(1, 9))
def test_lines_in_any_pieces(documents: list[dict[str, int]], size: int) -> None:
    documents = [{k.replace("\0", ""): v for k, v in d.items()} for d in documents]
    data = appendices.encode_lines(documents)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(appendices.read_lines(pieces)) == documents


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{}", "appendix-line"),
        (b"{}\n{}", "appendix-line"),
        (b"\n", "json-syntax"),
        (b"{}\n\n", "json-syntax"),
        (b"{}\r\n", ""),
        (b" " * L.MAX_JSON_SIZE + b"\n", "json-syntax"),
        (b" " * (L.MAX_JSON_SIZE + 1) + b"\n", "appendix-line"),
        (b" " * (3 * L.MAX_JSON_SIZE), "appendix-line"),
        (b"\n" * 1_000_000, "json-syntax"),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, bytes) else value,
)
def test_lines(data: bytes, code: str) -> None:
    def read() -> str:
        try:
            for _ in appendices.read_lines(data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)):
                pass
        except DocumentError as error:
            return error.code
        return ""

    assert read() == code
