# SPDX-License-Identifier: Apache-2.0
"""Strict JSON: whatever two readers could understand differently is refused, quickly."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.service import wire

AMBIGUOUS = {
    "not-utf-8": b'{"a":"\xff"}',
    "utf-16": '{"a":1}'.encode("utf-16"),
    "byte-order-mark": b'\xef\xbb\xbf{"a":1}',
    "empty": b"",
    "trailing": b'{"a":1} x',
    "two-values": b"{}{}",
    "nan": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "too-large-float": b'{"a":1e400}',
    "too-large-integer": b'{"a":9007199254740993}',
    "five-thousand-digits": b'{"a":' + b"9" * 5000 + b"}",
    "key-twice": b'{"a":1,"a":2}',
    "key-twice-inside": b'{"b":[{"a":1,"a":1}]}',
    "control-character": b'{"a":"\x01"}',
    "33-levels": b"[" * 33 + b"]" * 33,
    "hundred-thousand-levels": b"[" * 100_000,
    "single-quotes": b"{'a':1}",
    "unterminated": b'{"a":"',
}


@pytest.mark.parametrize("payload", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_ambiguous_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(wire.BadJson):
        wire.decode(payload)


def test_a_lone_surrogate_has_no_fingerprint() -> None:
    with pytest.raises(wire.BadJson, match="surrogate"):
        wire.fingerprint(wire.decode(b'{"a":["\\ud800"]}'))


def test_32_levels_and_the_largest_integer_pass() -> None:
    assert wire.decode(b"[" * 32 + b"]" * 32)
    assert wire.decode(b"[9007199254740992,-9007199254740992]") == [2**53, -(2**53)]


def test_brackets_inside_strings_are_no_levels() -> None:
    text = '{"' * 200 + "\\" + "[" * 200
    assert wire.decode(json.dumps([text]).encode()) == [text]


def test_structure_is_found_in_one_pass() -> None:
    # Each byte belongs to one match at most, so no input makes the scan go back.
    payload = b'"' + b'\\"' * 50
    spans = [match.span() for match in wire._STRUCTURE.finditer(payload)]
    assert spans[0] == (0, 1)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    with pytest.raises(wire.BadJson):
        wire.decode(payload * 1000)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_encoded_is_decoded(value: Any) -> None:
    assert wire.decode(wire.encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_refused(payload: bytes) -> None:
    try:
        value = wire.decode(payload)
    except wire.BadJson:
        return
    assert json.loads(payload) == value


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.integers())
)
def test_the_fingerprint_does_not_see_the_order_of_keys(value: dict[str, int]) -> None:
    turned = dict(reversed(list(value.items())))
    assert wire.fingerprint(value) == wire.fingerprint(turned)
    assert wire.fingerprint({**value, "more": 1}) != wire.fingerprint({**value, "more": 2})
