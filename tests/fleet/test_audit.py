# SPDX-License-Identifier: Apache-2.0
"""The audit log: nothing is changed, removed or put in unseen; a crash costs one line at most."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import FleetError
from edgecascade.fleet import audit


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    for n in range(5):
        audit.append(path, "stage", 1000.0 + n, {"order": "a", "n": n})
    return path


def test_each_line_holds_the_hash_of_the_line_before(log: Path) -> None:
    verdict = audit.verify(log)
    assert verdict.lines == 5
    events = [record for _, record in audit.records(log)]
    assert [record["n"] for record in events if record] == [0, 1, 2, 3, 4]
    assert audit.append(log, "abort", 2000.0, {}) == audit.verify(log).head


def test_every_changed_byte_is_noticed(log: Path) -> None:
    whole = log.read_bytes()
    head = audit.verify(log).head
    for place in range(len(whole)):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FleetError):
            audit.verify(log, expect=head)


@pytest.mark.parametrize("gone", range(4))
def test_a_removed_line_is_noticed(log: Path, gone: int) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    with pytest.raises(FleetError, match=f"line {gone + 1} does not follow"):
        audit.verify(log)


def test_an_exchanged_pair_and_an_inserted_line_are_noticed(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    for forged in ([*lines[:2], lines[3], lines[2], lines[4]], [*lines[:3], lines[1], *lines[3:]]):
        log.write_bytes(b"".join(forged))
        with pytest.raises(FleetError, match="does not follow"):
            audit.verify(log)


def test_an_end_cut_off_is_noticed_by_who_kept_the_head(log: Path) -> None:
    head = audit.verify(log).head
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]))
    assert audit.verify(log).lines == 3
    with pytest.raises(FleetError, match="lines are missing"):
        audit.verify(log, expect=head)


def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(log: Path) -> None:
    whole = log.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in range(len(last)):
        log.write_bytes(whole[: len(whole) - len(last) + kept])
        audit.verify(log)
        audit.append(log, "resume", 3000.0, {"order": "a"})
        audit.append(log, "abort", 3001.0, {"order": "a"})
        verdict = audit.verify(log)
        # Nothing was left of it, all but its end of line, or a piece that the next line names.
        assert verdict.lines == {0: 6, len(last) - 1: 7}.get(kept, 8)


def test_a_piece_of_a_line_that_nothing_explains_is_noticed(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b'{"event": "sta\n', *lines[2:]]))
    with pytest.raises(FleetError):
        audit.verify(log)


def test_many_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: audit.append(path, "stage", float(n), {"n": n}), range(64)))
    assert audit.verify(path).lines == 64


@settings(max_examples=30)
@given(st.text(max_size=2_000).map(lambda text: text * 50))
def test_any_text_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("audit") / "log"
    audit.append(path, "note", 1.0, {"text": text})
    audit.append(path, "note", 2.0, {})
    assert audit.verify(path).lines == 2
    assert json.loads(path.read_bytes().splitlines()[0])["text"] == text
