# SPDX-License-Identifier: Apache-2.0
"""A device's signed word on itself: what it may hold, and that it stays small."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from edgecascade.fleet import reports
from edgecascade.fleet.standing import MAX_STANDING_BYTES, Refused, Standing
from edgecascade.fleet.strict import BadDocument

WORD = Standing(
    "robot-1", 3, number=7, ts=1.8e9, bundle="tiny 1.0", manifest="ab" * 32, fresh_until=1.9e9,
    service="up", refused=Refused("o-1", "signature", "it is signed by 0 keys"),
)  # fmt: skip


def test_a_word_is_read_as_it_was_said() -> None:
    assert Standing.parse(WORD.to_bytes()) == WORD


def test_a_word_is_small() -> None:
    """Ten thousand are retained at one broker and read by one command."""
    signed = reports.sign(WORD, CryptoSigner.generate_ed25519())
    assert len(signed) < 1200


texts = st.text(st.characters(), max_size=3000)  # lone surrogates, too


@given(texts, texts, texts, texts)
def test_whatever_it_is_made_of_it_stays_small(one: str, two: str, three: str, four: str) -> None:
    word = Standing(
        "r", 1, bundle=one, order=four, repository=two, refused=Refused(one, two, three)
    )
    data = word.to_bytes()
    assert len(data) <= MAX_STANDING_BYTES
    assert Standing.parse(data).device == "r"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"device": "a b"},
        {"device": ""},
        {"status": "asleep"},
        {"boot": -1},
        {"number": 1.5},
        {"number": True},
        {"ts": -1.0},
        {"ts": "now"},
        {"ts": 1e300},
        {"fresh_until": 253_402_300_800.0},
        {"update_stale": 1},
        {"refused": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_none_is_refused(change: dict[str, Any]) -> None:
    body = {"schema": 1, **asdict(WORD), **change}
    with pytest.raises(BadDocument):
        Standing.parse(json.dumps(body).encode())
