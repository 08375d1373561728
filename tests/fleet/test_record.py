# SPDX-License-Identifier: Apache-2.0
"""A rollout's record: the order is a function of it, and it survives what a disk does."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import FleetError, InvalidRequest
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.orders import Cohort, Limits, Order, Window
from edgecascade.fleet.record import Record, Records
from edgecascade.fleet.rollout import STATES, Plan, Progress, Seen, Thresholds

ORDER = Order(
    order="o-1",
    seq=1,
    group="site-7",
    bundle="tiny",
    version="2.0",
    release_sha256="ab" * 32,
    not_before=0.0,
    expires=1e9,
    window=Window("UTC", "01:30", 90, (5, 6)),
    cohort=Cohort("o-1", 100),
    limits=Limits(5000, 2),
    mirrors=("https://cache.example/blobs/",),
)
RECORD = Record(ORDER, Plan("o-1", valid_s=1000.0), Progress(7, first="robot-1", signed_at=500.0))


def at(**changes: Any) -> Order:
    return replace(RECORD, progress=replace(RECORD.progress, **changes)).to_order()


def test_the_first_stage_names_its_device_and_later_ones_a_share() -> None:
    first, later = at(stage=0), at(stage=2)
    assert (first.device, first.cohort.percent) == ("robot-1", 100.0)
    assert (later.device, later.cohort.percent, later.cohort.salt) == (None, 5.0, "o-1")
    assert first.window == ORDER.window
    assert first.mirrors == ORDER.mirrors
    assert first.expires == 1500.0


@pytest.mark.parametrize(
    ("state", "action"),
    [
        ("running", "install"),
        ("done", "install"),
        ("paused", "pause"),
        ("aborted", "abort"),
        ("rolled-back", "rollback"),
    ],
)
def test_each_state_is_an_action(state: Any, action: str) -> None:
    order = at(state=state, stage=1)
    assert order.action == action
    assert (order.cohort.percent == 100.0) == (action != "install"), "everybody hears an end"


def test_a_device_pulls_no_faster_than_either_limit() -> None:
    assert at(kbit_s=0).limits.kbit_s == 5000
    assert at(kbit_s=800).limits.kbit_s == 800
    assert at(kbit_s=80_000).limits.kbit_s == 5000


@settings(max_examples=50)
@given(
    st.builds(
        Progress,
        seq=st.integers(1, 2**53),
        stage=st.integers(0, 4),
        first=st.just("robot-1"),
        state=st.sampled_from(STATES),
        reason=st.text(max_size=20),
        signed_at=st.floats(0, 1e9),
        good_since=st.none() | st.floats(0, 1e9),
        accepted=st.dictionaries(st.text(max_size=9), st.sampled_from(["failed", "silent"])),
        kbit_s=st.integers(0, 10**9),
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, progress: Progress
) -> None:
    records = Records(tmp_path_factory.mktemp("rollouts"))
    plan = Plan("o-1", thresholds=Thresholds(lost=3), first="robot-1", egress_kbit_s=1e7)
    record = Record(ORDER, plan, progress, {"robot-1": [3, 12.5, "k1"]})
    records.write(record)
    assert records.read("o-1") == record
    assert records.read("o-1").to_order() == record.to_order()


def test_what_was_believed_is_remembered() -> None:
    job = Job("o-1", 7, "robot-2", "IN_PROGRESS", "probation", version=4)
    seen = {"robot-2": Seen(1.0, True, job=job, heard=90.0, key="k2"), "robot-3": Seen(2.0, True)}
    moved = RECORD.moved(RECORD.progress, seen)
    assert moved.believed == {"robot-2": [4, 90.0, "k2"]}
    later = {"robot-3": Seen(2.0, True, job=replace(job, device="robot-3"), heard=95.0, key="k3")}
    both = moved.moved(RECORD.progress, later).believed
    assert both == {"robot-2": [4, 90.0, "k2"], "robot-3": [4, 95.0, "k3"]}, "also of the silent"


def test_numbers_grow_whatever_was_lost(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.next_seq("site-7", 1, 1000.0) == 1001
    records.write(replace(RECORD, progress=Progress(5000)))
    assert records.next_seq("site-7", 1, 1000.0) == 5001
    assert records.next_seq("site-8", 1, 1000.0) == 1001
    assert records.next_seq("site-7", 1 << 32, 1000.0) == (1 << 32) + 1000, "another epoch"


def test_the_newest_of_all_is_the_one_begun_last(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for name, group, seq, begun in (
        ("o-1", "site-7", 1009, 1000.0),  # ahead, because it was signed again many times
        ("o-2", "site-8", 1002, 1002.0),
        ("o-3", "site-7", 1010, 900.0),  # after the operator's clock went back
    ):
        order = replace(ORDER, order=name, group=group, seq=seq, expires=begun + 1000.0)
        records.write(replace(RECORD, order=order, progress=Progress(seq)))
    assert records.latest().order.order == "o-2"
    assert records.latest("site-7").order.order == "o-3", "within a group the numbers decide"
    assert records.latest("site-8").order.order == "o-2"


def test_damaged_and_unknown_records_are_named(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with pytest.raises(InvalidRequest, match="start one"):
        records.latest()
    records.write(RECORD)
    whole = (tmp_path / "o-1.json").read_bytes()
    for damaged in (b"", b"{}", whole[:-20], whole.replace(b'"running"', b'"runing"'), b"[1]"):
        (tmp_path / "o-1.json").write_bytes(damaged)
        with pytest.raises(FleetError, match=r"o-1\.json is damaged"):
            records.read("o-1")
    for name in ("../o-1", "o-2"):
        with pytest.raises(InvalidRequest):
            records.read(name)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 bytes: what a full disk does, in the middle of a write."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_record_that_was_there(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    records = Records(tmp_path / "rollouts")
    with records.locked():
        records.write(RECORD)
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=r"o-1\.json"):
        records.write(replace(RECORD, progress=replace(RECORD.progress, seq=9)))
    assert records.read("o-1") == RECORD
    assert sorted(path.name for path in records.folder.iterdir()) == ["lock", "o-1.json"]
