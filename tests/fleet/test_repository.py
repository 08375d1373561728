# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from build_engine.pipeline import build
from edgecascade.bundle import Bundle
from edgecascade.errors import EdgeCascadeError, FleetError
from edgecascade.fleet import delta
from edgecascade.fleet.faults.siege import DAY_S, FOLDER, GROUP, NAME, START, Camp, Siege
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.orders import Order
from edgecascade.fleet.refresh import Trust, folder_fetch
from edgecascade.fleet.release import Health, Requires
from edgecascade.fleet.repository import Offer, Repository

OFFER = Offer(NAME, "1.0", Requires(memory_mb=4), Health(min_tok_s=1.0), {"flush_ms": 20})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles; the second differs in one layer."""
    folder = tmp_path_factory.mktemp("bundles")
    tensors, trained = (checkpoints.arrays("BF16", seed=seed) for seed in (3, 4))
    other = {n: trained[n] if "layers.1." in n else tensors[n] for n in tensors}
    made = []
    for name, arrays in (("one", tensors), ("two", other)):
        checkpoint = checkpoints.write(folder / f"checkpoint-{name}", arrays)
        build(checkpoint, folder / name, verify=False)
        made.append(folder / name)
    return made[0], made[1]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    Repository.init(folder / "repository", KeyFolders([folder / "keys"]), START)
    return folder


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Repository:
    made = shutil.copytree(template, tmp_path / "made")
    return Repository(made / "repository", KeyFolders([made / "keys"]))


def device(repository: Repository, root: Path, now: float = START + 60) -> Trust:
    """A device that refreshes now."""
    root.mkdir(exist_ok=True)
    first = (repository.folder / "metadata" / "1.root.json").read_bytes()
    trust = Trust(root, first, folder_fetch(repository.folder))
    trust.refresh(now)
    return trust


def test_published_bundle_is_found_and_opens(
    repository: Repository, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    done = repository.publish(bundles[0], OFFER, START)
    found, _ = device(repository, tmp_path / "device").release(NAME, "1.0", done.sha256)
    assert (found.requires, found.health, found.config) == (
        OFFER.requires, OFFER.health, OFFER.config,
    )  # fmt: skip
    installed = tmp_path / "installed"
    installed.mkdir()
    for file in found.every_file:
        os.link(repository.folder / "blobs" / file.sha256, installed / file.path)
    with Bundle.open(installed, verify=True) as bundle, Bundle.open(bundles[0]) as original:
        assert bundle.id == original.id == found.manifest.sha256
    assert repository.check() == []


def test_unchanged_files_are_stored_once(
    repository: Repository, bundles: tuple[Path, Path]
) -> None:
    first = repository.publish(bundles[0], OFFER, START)
    second = repository.publish(bundles[1], replace(OFFER, version="1.1"), START)
    assert first.blobs_shared == 0
    assert second.blobs_written <= 3  # a layer, the manifest, the report
    assert second.blobs_shared == len(first.release.blobs) - second.blobs_written
    assert [r.version for r, _ in repository.releases()[NAME]] == ["1.0", "1.1"]
    assert repository.release(NAME)[0].seq == 2


def test_blobs_that_are_there_are_not_read(
    repository: Repository, bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.publish(bundles[0], OFFER, START)
    monkeypatch.setattr("edgecascade.fleet.blobs._link", None)
    monkeypatch.setattr("edgecascade.fleet.blobs._copy", None)
    again = repository.publish(bundles[0], replace(OFFER, version="1.1", config={}), START)
    assert again.blobs_written == 0


@pytest.mark.parametrize("link", [True, False])
def test_blob_is_a_second_name_or_a_copy(
    repository: Repository, bundles: tuple[Path, Path], link: bool, tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundles[0], tmp_path / "bundle")
    done = repository.publish(bundle, OFFER, START, link=link)
    for file in done.release.every_file:
        blob = repository.folder / "blobs" / file.sha256
        assert blob.samefile(bundle / file.path) is link
        assert blob.read_bytes() == (bundle / file.path).read_bytes()


def test_release_never_changes(repository: Repository, bundles: tuple[Path, Path]) -> None:
    first = repository.publish(bundles[0], OFFER, START)
    again = repository.publish(bundles[0], OFFER, START + 9)
    assert (again.release, again.sha256, again.blobs_written) == (first.release, first.sha256, 0)
    for bundle, offer in ((bundles[1], OFFER), (bundles[0], replace(OFFER, config={}))):
        with pytest.raises(FleetError, match="a release never changes: choose another version"):
            repository.publish(bundle, offer, START)


def test_damaged_bundle_is_not_published(
    repository: Repository, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    for link in (True, False):
        bundle = shutil.copytree(bundles[0], tmp_path / f"bundle-{link}")
        path = next(bundle.glob("weights-00003-*"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(FleetError, match=r"weights-00003-.* was changed: its SHA-256 is"):
            repository.publish(bundle, OFFER, START, link=link)
        assert repository.releases() == {}


@pytest.mark.parametrize("config", [{"slots": 3}, {"flush_ms": "fast"}, {"device_id": "r"}])
def test_a_configuration_that_every_device_would_refuse_is_not_published(
    repository: Repository, bundles: tuple[Path, Path], config: dict[str, Any]
) -> None:
    with pytest.raises(FleetError, match=f"its configuration sets {next(iter(config))}"):
        repository.publish(bundles[0], replace(OFFER, config=config), START)
    assert repository.releases() == {}


def test_version_that_cannot_be_a_folder_is_refused(
    repository: Repository, bundles: tuple[Path, Path]
) -> None:
    for wrong in ("", "../up", ".hidden", "a/b", "x" * 65):
        with pytest.raises(FleetError, match="no such release can be: version is"):
            repository.publish(bundles[0], replace(OFFER, version=wrong), START)


def test_deltas_make_the_changed_files(
    repository: Repository, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    tensors = checkpoints.arrays("BF16", seed=3)
    for folder, change in (("a", 0), ("b", 1)):
        arrays = dict(tensors)
        name = next(n for n in arrays if n.endswith("embeddings.weight"))
        dtype, values = arrays[name]
        nudged = np.array(values)
        nudged.reshape(-1)[:change] += 1
        arrays[name] = (dtype, nudged)
        build(checkpoints.write(moved / f"c-{folder}", arrays), moved / folder, verify=False)
    repository.publish(moved / "a", OFFER, START)
    offer = replace(OFFER, version="1.1", deltas_from=("1.0",))
    done = repository.publish(moved / "b", offer, START)
    assert done.release.deltas
    for ref in done.release.deltas:
        blobs = repository.folder / "blobs"
        assert (blobs / ref.sha256).stat().st_size == ref.size
        with open(tmp_path / "out", "wb") as out:
            size = done.release.blobs[ref.target]
            delta.restore(blobs / ref.base, blobs / ref.sha256, size, ref.target, out)
    with pytest.raises(FleetError, match=r"there is no release assistant 0\.9; there are: 1\.0"):
        repository.publish(moved / "b", replace(offer, version="2", deltas_from=("0.9",)), START)


def test_missing_keys_are_named_before_anything_is_written(
    repository: Repository, bundles: tuple[Path, Path]
) -> None:
    for path in repository.keys.folders[0].glob("targets-*.pem"):
        path.unlink()
    with pytest.raises(FleetError, match="1 of the keys of targets must sign, 0 are at hand"):
        repository.publish(bundles[0], OFFER, START)
    assert not any((repository.folder / "blobs").iterdir())


def test_check_names_what_is_wrong(repository: Repository, bundles: tuple[Path, Path]) -> None:
    done = repository.publish(bundles[0], OFFER, START, link=False)
    one, other, *_ = (repository.folder / "blobs" / f.sha256 for f in done.release.files)
    one.unlink()
    other.write_bytes(other.read_bytes()[:-1] + b"\0")
    wrong = "\n".join(repository.check())
    assert f"{one} is missing" in wrong
    assert f"{other} is damaged" in wrong


def test_init_does_not_write_over_anything(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(FleetError, match="exists; choose another folder"):
        Repository.init(tmp_path / "there", KeyFolders([tmp_path / "keys"]), START)
    with pytest.raises(FleetError, match="no profile 'huge'; choose from full, small"):
        Repository.init(tmp_path / "x", KeyFolders([tmp_path / "keys"]), START, profile="huge")
    with pytest.raises(FleetError, match="is no repository; make one: edgecascade fleet init"):
        Repository(tmp_path / "there", KeyFolders([]))
    assert not (tmp_path / "keys").exists()


def test_init_goes_on_with_keys_that_are_there(tmp_path: Path) -> None:
    keys = KeyFolders([tmp_path / "keys"])
    first = Repository.init(tmp_path / "one", keys, START, profile="full")
    second = Repository.init(tmp_path / "two", keys, START, profile="full")
    assert len(list((tmp_path / "keys").iterdir())) == 9
    assert first.order_keys() == second.order_keys()


def test_init_makes_a_key_for_each_operator(tmp_path: Path) -> None:
    keys = KeyFolders([tmp_path / "keys"])
    names = ("alice", "bob", "carol")
    made = Repository.init(tmp_path / "one", keys, START, operators=names)
    assert tuple(key.owner for key in made.order_keys().keys) == names
    assert len(keys.keys("orders")) == 3


@pytest.mark.parametrize(
    ("names", "said"),
    [(["../x"], "owner is '../x'"), (["a b"], "owner"), ([""], "owner"), (["a", "a"], "each once")],
    ids=str,
)
def test_operators_that_cannot_be_leave_nothing_behind(
    tmp_path: Path, names: list[str], said: str
) -> None:
    with pytest.raises(FleetError, match=said):
        Repository.init(tmp_path / "r", KeyFolders([tmp_path / "keys"]), START, operators=names)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_takes_no_key_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    keys = KeyFolders([tmp_path / "keys"])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"keys/root-1\.pem"):
            keys.generate("root")
    assert not list((tmp_path / "keys").iterdir())
    assert keys.generate("root").path == tmp_path / "keys" / "root-1.pem"


def test_no_key_is_made_for_a_name_that_cannot_be(repository: Repository) -> None:
    before = sorted(repository.folder.parent.rglob("*.pem"))
    for owner, groups in (("a b", ()), ("dora", ("a b",))):
        with pytest.raises(FleetError, match="no such operator can be"):
            repository.add_order_key(owner, START, groups)
    # A pattern would take in other names' releases; a path would leave the folder of keys.
    for name in ("*", "tiny*", "../tiny", "a/b", ""):
        with pytest.raises(FleetError, match="is no bundle's name"):
            repository.delegate(name, START)
    assert sorted(repository.folder.parent.rglob("*.pem")) == before


def order(repository: Repository, **changes: object) -> Order:
    base = Order("one", repository.next_seq(GROUP), GROUP, NAME, "1.0", "0" * 64, START, START + 9)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_numbers_of_a_group_only_grow(repository: Repository) -> None:
    first = repository.sign_order(order(repository))
    assert repository.next_seq(GROUP) == 2
    assert repository.next_seq("other") == 1
    assert repository.sign_order(order(repository, seq=1)) == first  # the very same again
    with pytest.raises(FleetError, match="has seq 1; the next one for group 'site-7' is 2"):
        repository.sign_order(order(repository, seq=1, action="abort"))
    assert (repository.folder / "orders" / f"{GROUP}.json").read_bytes() == first


def test_who_may_not_sign_an_order_is_told_what_to_do(repository: Repository) -> None:
    without = Repository(repository.folder, KeyFolders([repository.folder]))
    with pytest.raises(FleetError, match=r"keys of 0 are at hand .*--keys, or .*--add-operator"):
        without.sign_order(order(repository))


def test_operators_come_and_go(repository: Repository) -> None:
    repository.add_order_key("carol", START, groups=("site-8",))
    assert [key.owner for key in repository.order_keys().keys] == ["operator", "carol"]
    with pytest.raises(FleetError, match="operator 'carol' has a key; revoke it first"):
        repository.add_order_key("carol", START)
    with pytest.raises(FleetError, match="no operator 'dave'; there are operator, carol"):
        repository.revoke_order_key("dave", START)
    assert repository.revoke_order_key("carol", START).epoch == 1
    with pytest.raises(FleetError, match="without 'operator' there are 0 operators"):
        repository.revoke_order_key("operator", START)
    assert repository.next_seq(GROUP) == 1 << 32


def test_refresh_signs_what_is_due(repository: Repository, tmp_path: Path) -> None:
    before = repository.expiries()
    after = repository.refresh(START + DAY_S)
    assert after["timestamp"] == before["timestamp"] + DAY_S
    assert {r: after[r] for r in ("root", "targets", "snapshot")} == {
        r: before[r] for r in ("root", "targets", "snapshot")
    }
    late = START + 400 * DAY_S
    assert min(repository.refresh(late).values()) > late
    device(repository, tmp_path / "device", late)


def test_refresh_does_with_the_online_keys_alone(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    for path in repository.keys.folders[0].iterdir():
        if path.name.split("-")[0] not in ("timestamp", "snapshot"):
            path.unlink()
    after = repository.refresh(START + 200 * DAY_S)
    assert after["timestamp"] > START + 200 * DAY_S
    assert "targets expires soon, and its keys are not at hand" in caplog.text


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_lost_keys_are_replaced_without_them(
    repository: Repository, tmp_path: Path, role: str
) -> None:
    known = repository.keys.keys(role)
    known[0].path.unlink()
    if role == "root":
        repository.rotate(role, START, lost=[known[0].keyid[:8]])  # the other one signs
    else:
        repository.rotate(role, START)
    device(repository, tmp_path / "device")
    repository.refresh(START + 9)


def test_rotate_names_what_is_wrong(repository: Repository) -> None:
    with pytest.raises(FleetError, match="'orders' is no role; choose from"):
        repository.rotate("orders", START)
    with pytest.raises(FleetError, match="timestamp has 0 keys '123'; it has"):
        repository.rotate("timestamp", START, lost=["123"])
    for key in repository.keys.keys("root"):
        key.path.unlink()
    with pytest.raises(FleetError, match="1 of the keys of root must sign, 0 are at hand"):
        repository.rotate("timestamp", START)
    assert len(repository.keys.keys("timestamp")) == 1


def test_delegated_name_needs_its_own_keys(
    repository: Repository, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    repository.delegate("vision", START)
    done = repository.publish(bundles[0], replace(OFFER, name="vision"), START)
    assert device(repository, tmp_path / "device").release("vision", "1.0", done.sha256)
    for path in repository.keys.folders[0].glob("vision-publisher-*"):
        path.unlink()
    with pytest.raises(FleetError, match="1 of the keys of vision-publisher must sign"):
        repository.publish(bundles[1], replace(OFFER, name="vision", version="2"), START)
    repository.publish(bundles[1], OFFER, START)
    with pytest.raises(FleetError, match="delegate a name before its first"):
        repository.delegate(NAME, START)


def killed(act: Callable[[], object], at: int) -> bool:
    """Whether a process that does this was killed at its n-th effect; False when it was done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads: none is used below
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = at
    for name in ("replace", "rename", "link", "unlink", "fsync"):
        real = getattr(os, name)

        @functools.wraps(real)
        def counted(*args: object, real: Callable[..., object] = real, **more: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return real(*args, **more)

        setattr(os, name, counted)
    with suppress(EdgeCascadeError):
        act()
        os._exit(0)
    os._exit(1)


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        yield Path(folder)


def test_killed_publish_leaves_the_old_repository(
    template: Path, bundles: tuple[Path, Path], memory: Path
) -> None:
    shutil.copytree(template, memory / "made")
    shutil.copytree(bundles[1], memory / "bundle")
    repository = Repository(memory / "made" / "repository", KeyFolders([memory / "made" / "keys"]))
    first = repository.publish(bundles[0], OFFER, START)
    offer = replace(OFFER, version="1.1", deltas_from=("1.0",))
    kills = 0
    while killed(lambda: repository.publish(memory / "bundle", offer, START), kills):
        kills += 1
        trust = device(repository, memory / "device", START + 60 + kills)
        assert trust.release(NAME, "1.0", first.sha256)
        if len(repository.releases()[NAME]) > 1:  # the timestamp is there: it is published
            break
    assert kills > 15
    done = repository.publish(memory / "bundle", offer, START + 100)
    assert device(repository, memory / "device", START + 120).release(NAME, "1.1", done.sha256)
    assert repository.check() == []
    left = [path.name for path in repository.folder.rglob(".*")]
    assert left == []


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_killed_change_of_keys_keeps_devices_going(role: str) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        camp = Camp(Path(folder) / "camp", random.Random(1))
        at = 0
        alive = True
        while alive:
            with camp.siege(random.Random(at)) as siege:
                alive = _survives_kill(siege, role, at)
            at += 1
        assert at > 10


def _survives_kill(siege: Siege, role: str, at: int) -> bool:
    was_killed = killed(lambda: siege.repository.rotate(role, siege.now), at)
    siege.device.refresh()
    siege.repository.rotate(role, siege.now)  # the operator does it again
    siege.device.refresh()
    siege.publish("3.0")
    siege.device.take(siege.signed("3.0"))
    return was_killed
