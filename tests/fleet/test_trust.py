# SPDX-License-Identifier: Apache-2.0
"""What ngclient leaves open, closed: nothing unsynced, no way back after a loss, no turning back of
time, and no blob through it.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from edgecascade.errors import FleetError, NetworkError, UpdateFailed, UpdateRefused
from edgecascade.fleet import clock, orders, release, trust
from edgecascade.fleet import refresh as refresh_module
from edgecascade.fleet.clock import BUILT, LAST, trusted_now
from edgecascade.fleet.faults.siege import DAY_S, FOLDER, GROUP, NAME, Camp, Siege
from edgecascade.fleet.floor import Floor, raise_floor, read_floor
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.refresh import folder_fetch
from edgecascade.fleet.sealed import seal, unseal
from edgecascade.fleet.trust import Belief, Seen


@pytest.fixture(scope="module")
def camp() -> Iterator[Camp]:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        yield Camp(Path(folder) / "camp", random.Random(1))


@pytest.fixture
def siege(camp: Camp) -> Iterator[Siege]:
    with camp.siege(random.Random(1)) as made:
        yield made


def test_release_of_an_order_is_found(siege: Siege) -> None:
    known = siege.device.refresh()
    assert [key.owner for key in known.order_keys.keys] == ["alice", "bob"]
    published, sha256 = siege.repository.release(NAME)
    found, data = siege.device.trust.release(NAME, "2.0", sha256)
    assert found == published
    assert data == published.to_bytes()


def test_refresh_costs_a_few_kilobytes(siege: Siege) -> None:
    siege.device.refresh()
    assert siege.mirror.bytes_given < 6000


def test_all_metadata_are_synced_before_the_floor_names_them(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), siege.device.root))
        fsync(fd)

    siege.publish("3.0")
    monkeypatch.setattr(os, "fsync", noting)
    siege.device.refresh()
    before_floor = synced[: next(i for i, name in enumerate(synced) if "floor" in name)]
    tuf = siege.device.root / "tuf"
    stored = {str(p.relative_to(siege.device.root)) for p in tuf.rglob("*") if not p.is_symlink()}
    assert {*stored, "tuf"} <= set(before_floor)


def test_nothing_goes_through_a_temporary_file(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a file in /tmp")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    siege.device.refresh()
    siege.device.trust.release(NAME, "2.0", siege.repository.release(NAME, "2.0")[1])


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json", "root.json"])
@pytest.mark.parametrize("how", ["empty", "torn", "gone", "folder", "garbage"])
def test_damaged_metadata_are_fetched_again(siege: Siege, name: str, how: str) -> None:
    siege.device.refresh()
    path = siege.device.root / "tuf" / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"empty": b"", "torn": data[:99], "garbage": b"\0" * 99}[how])
    for attempt in range(2):
        try:
            siege.device.refresh()
            return
        except UpdateFailed:
            assert attempt == 0, "it does not mend itself"


def test_file_in_the_place_of_the_folder_is_replaced(siege: Siege) -> None:
    siege.device.lose("tuf")
    (siege.device.root / "tuf").write_text("")
    with pytest.raises(UpdateFailed, match="metadata cannot be stored"):
        siege.device.refresh()
    siege.device.refresh()


def test_without_our_floor_ngclient_would_take_old_metadata(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    siege.device.lose("tuf")
    siege.mirror.folder = siege.old
    with pytest.raises(UpdateRefused, match="version 3, this device has seen 4") as caught:
        siege.device.refresh()
    assert caught.value.reason == "rollback"
    monkeypatch.setattr("edgecascade.fleet.trust.check_floor", lambda floor, seen: None)
    siege.device.refresh()


def test_snapshot_that_leads_nowhere_does_not_stay(siege: Siege) -> None:
    forged = siege.forgery()
    signers = {"targets": siege.foreign("targets", 2)}
    signers |= {role: siege.stolen(role, 1) for role in ("snapshot", "timestamp")}
    forged.write(signers, siege.now)
    with pytest.raises(UpdateRefused):
        siege.device.refresh()
    siege.mirror.folder = siege.repository.folder
    siege.publish("3.0")  # takes the numbers of the forgery
    siege.device.refresh()


def seen(root: int, timestamp: int, online: str = "a", time: float = 0.0) -> Seen:
    return Seen(root, timestamp, timestamp, timestamp, online, time)


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        (seen(1, 5), seen(1, 3), seen(1, 5)),
        (seen(1, 5, time=9.0), seen(2, 3), seen(2, 5, time=9.0)),
        # New online keys: what a thief of the old ones may have pushed up does not count.
        (seen(1, 99, time=9.0), seen(2, 3, "b"), Seen(2, 3, 3, 99, "b", 0.0)),
        (Seen(), seen(4, 7), seen(4, 7)),
    ],
)
def test_floor_takes_the_higher_of_both(one: Seen, other: Seen, merged: Seen) -> None:
    assert one.merged(other) == merged
    assert other.merged(one) == merged


def test_floor_of_a_later_version_is_never_taken_for_nothing(tmp_path: Path) -> None:
    files = RealFiles(tmp_path)
    raise_floor(files, orders={GROUP: 7})
    text = unseal("floor", (tmp_path / "floor-a").read_bytes())
    assert text is not None
    later = seal("floor", text.replace(b'"orders"', b'"orders-2"'))
    (tmp_path / "floor-a").write_bytes(later)
    with pytest.raises(UpdateFailed, match="install the version that wrote it"):
        read_floor(files)


def test_floor_survives_the_loss_of_either_copy(tmp_path: Path) -> None:
    files = RealFiles(tmp_path)
    expected = Floor({GROUP: 7}, {NAME: 3}, seen(2, 9))
    raise_floor(files, orders={GROUP: 7}, releases={NAME: 3}, metadata=seen(2, 9))
    for name in ("floor-a", "floor-b"):
        (tmp_path / name).write_bytes(b"")
        assert read_floor(files) == expected
        raise_floor(files)
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("system", "proven", "elapsed", "time", "suspect"),
    [
        (BUILT + 50, BUILT + 40, 5.0, BUILT + 50, False),
        (0.0, BUILT + 40, 5.0, BUILT + 45, True),
        (0.0, 0.0, 0.0, BUILT, True),
        (-1e12, BUILT + 40, 5.0, BUILT + 45, True),
        (float("nan"), BUILT + 40, 5.0, BUILT + 45, True),
        (BUILT + 40, BUILT + 50, 5.0, BUILT + 55, False),  # a few seconds: NTP is about to come
        (BUILT + 40, BUILT + 50, 1e6, BUILT + 50 + 1e6, True),
        (1e15, BUILT, 0.0, LAST, False),
        (float("inf"), BUILT, 0.0, LAST, False),
    ],
)
def test_time_is_never_before_what_is_proven(
    system: float, proven: float, elapsed: float, time: float, suspect: bool
) -> None:
    now = trusted_now(system, proven, elapsed)
    assert (now.time, now.suspect) == (time, suspect)


def test_silence_is_noticed_when_the_timestamp_expires(siege: Siege) -> None:
    device = siege.device
    fresh_until = device.refresh().fresh_until
    assert not device.is_stale(fresh_until - 1)
    assert device.is_stale(fresh_until)
    device.lose("belief")
    assert not device.is_stale(siege.now), "while it runs it knows by itself"
    device.boot()
    assert device.is_stale(siege.now)


def test_orders_are_checked_by_the_last_known_keys(siege: Siege) -> None:
    known = siege.device.refresh()
    siege.device.boot()
    siege.mirror.down = True
    with pytest.raises(NetworkError, match="out of reach"):
        siege.device.refresh()
    assert siege.device.trust.order_keys(siege.now) == known.order_keys
    with pytest.raises(UpdateRefused, match="who may sign orders"):
        siege.device.trust.order_keys(siege.now + 91 * DAY_S)


def test_damaged_belief_costs_a_refresh(siege: Siege) -> None:
    siege.device.refresh()
    path = siege.device.root / "belief"
    good = path.read_bytes()
    assert Belief.parse(good) is not None
    for at in range(0, len(good), 7):
        assert Belief.parse(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]) is None
    path.write_bytes(good[:-5])
    with pytest.raises(UpdateRefused, match="who may sign orders is not known"):
        siege.device.trust.order_keys(siege.now)
    siege.device.refresh()
    assert siege.device.trust.order_keys(siege.now)


def test_release_before_a_refresh_is_a_mistake(siege: Siege) -> None:
    with pytest.raises(FleetError, match="after a refresh that succeeded"):
        siege.device.trust.release(NAME, "2.0", "0" * 64)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_device_follows_a_change_of_keys(siege: Siege, role: str) -> None:
    siege.device.refresh()
    siege.repository.rotate(role, siege.now)
    siege.device.refresh()
    siege.publish("3.0")
    assert siege.device.take(siege.signed("3.0")).version == "3.0"


def test_device_catches_up_after_many_changes_of_keys(siege: Siege) -> None:
    for role in ("timestamp", "root", "snapshot", "timestamp", "targets", "root"):
        siege.repository.rotate(role, siege.now)
    siege.device.take(siege.signed())


def test_publisher_of_a_name_signs_its_releases(siege: Siege) -> None:
    siege.repository.delegate("vision", siege.now)
    made, _ = siege.repository.release(NAME, "1.0")
    sha256 = siege.repository.sign_release(replace(made, name="vision"), siege.now)
    siege.device.refresh()
    found, _ = siege.device.trust.release("vision", "1.0", sha256)
    assert found.name == "vision"


def test_stick_is_a_repository_too(siege: Siege, tmp_path: Path) -> None:
    stick = shutil.copytree(siege.repository.folder, tmp_path / "stick")
    siege.device.mirror = siege.mirror
    siege.mirror.folder = stick
    envelope = siege.signed()
    assert siege.device.take(envelope)


def test_folder_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    fetch = folder_fetch(tmp_path / "inside")
    for path in ("../secret", "/etc/passwd", "a/../../secret", "", "./x", "link"):
        with pytest.raises(FileNotFoundError):
            fetch(path, 10)


@pytest.mark.parametrize("module", [clock, orders, release, trust])
def test_what_decides_touches_nothing(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"os", "io", "pathlib", "socket", "time", "tempfile", "shutil", "http"}


def test_limits_of_ngclient_are_set(siege: Siege) -> None:
    client = siege.device.trust._client(siege.device.trust.now(siege.now))
    config = client.config
    assert config.max_root_rotations == refresh_module.MAX_ROOTS
    assert config.max_delegations == refresh_module.MAX_DELEGATIONS
