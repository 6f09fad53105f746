"""Strict decoding: one text has one meaning, or it is refused."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x402mw.core import strict
from x402mw.core.errors import Malformed

JSON_JUNK = [
    b"", b" ", b"{", b"{]", b"\xff", b"\xef\xbb\xbf{}", b"NaN", b"Infinity", b'{"a":-Infinity}',
    b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'{"a":"\\ud800"}', b'{"\\udfff":1}', b"'a'",
    b'["\\ud83d"]', b'["\xed\xa0\x80"]', b"01", b"+1", b".5", b"1.", b"1e", b"0x1", b"{}{}",
    b'{"a":1,}', b"[1,]", b"//\n{}", b"\x00", b'"\n"', b"tru", b"[" * 9 + b"]" * 9,
    b'{"a":' * 9 + b"1" + b"}" * 9, b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000,
    b"1e" + b"9" * 30, b"-1e" + b"9" * 30, b"1e-" + b"9" * 30,
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("raw", JSON_JUNK, ids=lambda raw: repr(raw[:20]))
def test_junk_json_is_malformed(raw: bytes) -> None:
    """Duplicate keys, NaN, half characters, depth and bad syntax are one typed refusal."""
    with pytest.raises(Malformed):
        strict.loads(raw)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_malformed(raw: bytes) -> None:
    """No bytes whatever raise anything but `Malformed`."""
    for read in (strict.loads, strict.loads_object, strict.b64_decode):
        with contextlib.suppress(Malformed):
            read(raw)


@given(JSON)
def test_json_reads_back(value: Any) -> None:
    """What we write, we read."""
    assert strict.loads(strict.dumps(value), nesting_max=64) == value


def test_escaped_pairs_are_whole_characters() -> None:
    """A surrogate pair in escapes is one character, and fine."""
    assert strict.loads(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_eight_levels_are_allowed() -> None:
    """Eight levels of nesting pass, also with many brackets side by side."""
    assert strict.loads(b"[" * 8 + b"]" * 8)
    assert strict.loads(b"[" + b"[1]," * 20 + b"{}]")


@pytest.mark.parametrize("raw", [b"[]", b"1", b"null", b'"a"'])
def test_an_object_is_asked_for(raw: bytes) -> None:
    """Where an object belongs nothing else passes."""
    with pytest.raises(Malformed):
        strict.loads_object(raw)


@pytest.mark.parametrize(
    "text",
    [b"Zg=", b"Zg", b"Zh==", b"Zg==\n", b" Zg==", b"Z g==", b"Zg===", b"Z-_=", b"\xff", b"="],
)
def test_loose_base64_is_malformed(text: bytes) -> None:
    """Base64 that would re-encode to another text is refused."""
    with pytest.raises(Malformed):
        strict.b64_decode(text)


@pytest.mark.parametrize(
    "text", ["Zh", "Zg=", "Zg==", "Z", "", "Zg\n", "Z+", "é1", "Z ", "Zgg", "\ud800a", "=="]
)
def test_loose_base64url_is_malformed(text: str) -> None:
    """Base64url has no padding, no spare bits, and exactly the asked size."""
    with pytest.raises(Malformed):
        strict.b64url_decode(text, 1)


def test_base64url_of_other_characters_is_malformed() -> None:
    """Characters outside the alphabet are refused, not skipped."""
    for text in ("Z!gg", "Zg=g", "=Zgg", "Z\x00gg"):
        with pytest.raises(Malformed):
            strict.b64url_decode(text, 3)


@given(st.binary(max_size=40))
def test_encodings_read_back(raw: bytes) -> None:
    """Every encoding of ours decodes to the same bytes."""
    assert strict.b64_decode(strict.b64_encode(raw).encode()) == raw
    assert strict.b64url_decode(strict.b64url_encode(raw), len(raw)) == raw


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, True), (0, False), (1, strict.loads(b"1.0")), ({"a": 1}, {"a": True}), ([1], [1, 1]),
     ({"a": 1}, {"b": 1}), ([1], [True]), ("1", 1), (None, False)],
)  # fmt: skip
def test_values_that_only_python_calls_equal_differ(left: Any, right: Any) -> None:
    """`true`, `1` and `1.0` are three values."""
    assert not strict.same(left, right)


@given(JSON)
def test_a_value_is_the_same_as_itself(value: Any) -> None:
    """A value is the same as its copy."""
    assert strict.same(value, strict.loads(strict.dumps(value), nesting_max=64))


def test_what_cannot_be_echoed_is_malformed() -> None:
    """A number with a point has no exact way back, so nothing that must be echoed may hold one."""
    for raw in (b"1.5", b'{"extra":{"rate":1e-7}}', b"[1.0]"):
        with pytest.raises(Malformed):
            strict.dumps(strict.loads(raw))
    with pytest.raises(TypeError):
        strict.dumps({"key": b"bytes"})
