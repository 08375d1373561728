# SPDX-License-Identifier: Apache-2.0
"""Blobs and bundles on a real disk."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from edgecascade import verified
from edgecascade.errors import UpdateFailed
from edgecascade.fleet import fs, relay
from edgecascade.fleet.faults.world import Published, publish
from edgecascade.fleet.fs import RealFiles, remove_tree, replace_file
from edgecascade.fleet.refresh import folder_fetch
from edgecascade.fleet.store import DISK_BLOCK, Store
from edgecascade.manifest import ENGINES
from edgecascade.service import wire


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "device"
    folder.mkdir()
    return folder


@pytest.fixture
def store(root: Path) -> Store:
    made = Store(RealFiles(root), margin_bytes=0)
    made.prepare()
    return made


@pytest.mark.parametrize("kind", ["absent", "folder", "link", "pipe", "socket", "below-a-file"])
def test_what_is_no_file_is_absent_and_is_closed(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "metadata" / "thing"
    path.parent.mkdir()
    (root / "secret").write_bytes(b"secret")
    with socket.socket(socket.AF_UNIX) as ear:
        match kind:
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to(root / "secret")
            case "pipe":
                os.mkfifo(path)
            case "socket":
                monkeypatch.chdir(root)  # its whole path may be too long
                ear.bind("metadata/thing")
            case "below-a-file":
                path.parent.rmdir()
                path.parent.write_bytes(b"")
        question = wire.encode({"id": "a", "path": "metadata/thing", "offset": 0})
        opened = os.listdir("/proc/self/fd")
        assert RealFiles(root).read("metadata/thing", 10) is None
        with pytest.raises(FileNotFoundError):
            folder_fetch(root)("metadata/thing", 10)
        assert b'"status":404' in (relay.answer(root, question) or b"")
        assert os.listdir("/proc/self/fd") == opened


def put(store: Store, what: Published, *, but: str = "") -> None:
    store.put_release(what.sha256, what.document)
    for sha256, data in what.blobs.items():
        if sha256 != but and store.files.size(f"blobs/{sha256}") is None:
            store.files.create(f"partial/{sha256}", data)
            store.adopt(sha256)


def pair() -> tuple[Published, Published]:
    rng = random.Random(1)
    old = publish(rng, 1)
    return old, publish(rng, 2, base=old)


def test_a_bundle_is_hard_links_into_the_blobs(store: Store, root: Path) -> None:
    old, new = pair()
    for what in (old, new):
        put(store, what)
        store.stage(what.release)
        folder = root / "bundles" / what.slot.manifest
        for file in what.release.every_file:
            assert (folder / file.path).samefile(root / "blobs" / file.sha256)
    shared = old.release.blobs.keys() & new.release.blobs.keys()
    assert len(shared) == 1
    assert (root / "blobs" / shared.pop()).stat().st_nlink == 3


def test_room_is_needed_for_new_blobs_only(store: Store) -> None:
    old, new = pair()
    put(store, old)
    sizes = [size for sha, size in new.release.blobs.items() if sha not in old.release.blobs]
    assert store.need_bytes(new.release) == DISK_BLOCK * len(sizes)
    half = next(sha for sha in new.release.blobs if sha not in old.release.blobs)
    store.files.create(f"partial/{half}", new.blobs[half])
    assert store.need_bytes(new.release) == DISK_BLOCK * (len(sizes) - 1)
    put(store, new)
    assert store.need_bytes(new.release) == 0


def test_what_only_the_previous_bundle_has_can_be_freed(store: Store) -> None:
    old, new = pair()
    for what in (old, new):
        put(store, what)
    own = [size for sha, size in old.release.blobs.items() if sha not in new.release.blobs]
    assert store.spare_bytes(old.slot, [new.slot]) == sum(own)


def test_a_changed_blob_is_named_and_removed(store: Store, root: Path) -> None:
    old, _ = pair()
    put(store, old)
    assert store.verify(old.release) == ()
    victim = min(old.release.blobs)
    data = bytearray(old.blobs[victim])
    data[7] ^= 4
    (root / "blobs" / victim).write_bytes(data)
    assert store.verify(old.release) == (victim,)
    assert store.missing(old.release) == {victim: len(data)}


def test_what_was_hashed_is_not_hashed_again_for_being_linked(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pair()
    for what in (old, new):
        put(store, what)
        store.verify(what.release)
        store.stage(what.release)
    store.collect([new.slot])
    monkeypatch.setattr(fs, "sha256_file", lambda path: pytest.fail(f"{path} was hashed again"))
    assert store.verify(new.release) == ()
    assert store.check(new.slot) == ""
    for file in new.release.every_file:
        path = root / "bundles" / new.slot.manifest / file.path
        assert verified.is_verified(path, file.sha256)


def test_a_stamp_never_outlives_a_write(store: Store, root: Path) -> None:
    old, _ = pair()
    put(store, old)
    store.verify(old.release)
    victim = min(old.release.blobs)
    path = root / "blobs" / victim
    path.write_bytes(bytes(len(old.blobs[victim])))
    store.files.link(f"blobs/{victim}", "twin")
    assert not verified.is_verified(path, victim)
    assert store.verify(old.release) == (victim,)


def test_the_folder_follows_from_the_blobs(store: Store, root: Path) -> None:
    old, _ = pair()
    put(store, old)
    store.stage(old.release)
    folder = root / "bundles" / old.slot.manifest
    (folder / ENGINES / "sm87").mkdir(parents=True)
    (folder / ENGINES / "sm87" / "model.plan").write_bytes(b"plan")
    (folder / "report.json").unlink()
    (folder / "stray").write_bytes(b"?")
    assert store.check(old.slot) == ""
    names = {file.path for file in old.release.every_file}
    assert {path.name for path in folder.iterdir()} == names | {ENGINES}
    assert (folder / ENGINES / "sm87" / "model.plan").read_bytes() == b"plan"


def test_collecting_keeps_what_is_kept_and_nothing_else(store: Store, root: Path) -> None:
    old, new = pair()
    for what in (old, new):
        put(store, what)
        store.stage(what.release)
    (root / "partial" / ("0" * 64)).write_bytes(b"begun")
    store.collect([new.slot])
    assert {path.name for path in (root / "blobs").iterdir()} == set(new.release.blobs)
    assert [path.name for path in (root / "bundles").iterdir()] == [new.slot.manifest]
    assert [path.name for path in (root / "releases").iterdir()] == [new.sha256]
    assert list((root / "partial").iterdir()) == []


def test_a_link_is_never_followed(store: Store, root: Path, tmp_path: Path) -> None:
    old, _ = pair()
    put(store, old)
    victim = root / "blobs" / min(old.release.blobs)
    elsewhere = tmp_path / "elsewhere"
    os.rename(victim, elsewhere)
    victim.symlink_to(elsewhere)
    assert store.verify(old.release) == (victim.name,)
    assert elsewhere.exists()
    (root / "bundles" / "x").symlink_to(tmp_path)
    remove_tree(store.files, "bundles/x")
    assert elsewhere.exists()
    assert not (root / "bundles" / "x").is_symlink()


def test_a_lost_release_document_is_said(store: Store, root: Path) -> None:
    old, _ = pair()
    put(store, old)
    (root / "releases" / old.sha256).write_bytes(b"{}")
    with pytest.raises(UpdateFailed, match="missing or damaged"):
        store.release(old.sha256)


def test_a_small_file_is_replaced_whole(root: Path) -> None:
    files = RealFiles(root)
    replace_file(files, "state.json", b"one")
    replace_file(files, "state.json", b"two")
    assert files.read("state.json", 3) == b"two"
    assert files.read("state.json", 2) is None
    assert files.names("") == ["state.json"]
