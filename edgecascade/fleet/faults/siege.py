# SPDX-License-Identifier: Apache-2.0
"""A fleet of one device under attack: its repository, a mirror that lies, and stolen keys.

Trust, floor, orders and updater are the real ones, on a real disk. The mirror and the broker belong
to the attacker: what the device fetches and which envelopes it is handed are his choice.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecascade.errors import UpdateRefused
from edgecascade.fleet import orders
from edgecascade.fleet.clock import BUILT
from edgecascade.fleet.events import Ordered, RaiseFloor
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.floor import raise_floor, read_floor
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.intake import Intake
from edgecascade.fleet.keys import Key, KeyFolders
from edgecascade.fleet.metadata import RolePlan, SignedMetadata
from edgecascade.fleet.orders import Order
from edgecascade.fleet.refresh import Refreshed, Trust, folder_fetch
from edgecascade.fleet.release import FileRef, Release
from edgecascade.fleet.repository import Repository
from edgecascade.fleet.state import DeviceState, Slot
from edgecascade.fleet.updater import update

DAY_S = 86_400.0
START = BUILT + 100 * DAY_S
NAME, GROUP, DEVICE = "assistant", "site-7", "robot-1"
PLAN = {
    "root": RolePlan(3, 2, 365),
    "targets": RolePlan(2, 2, 90),
    "snapshot": RolePlan(1, 1, 7),
    "timestamp": RolePlan(1, 1, 1),
    "orders": RolePlan(2, 1),
}

# Nothing here is about the disk, and an attack syncs a hundred times: memory, where there is some.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

Content = bytes | Callable[[int], bytes] | None  # None: not there


@dataclass
class Mirror:
    """A folder, with some files replaced; what was taken from it is counted."""

    folder: Path
    files: dict[str, Content] = field(default_factory=dict)
    down: bool = False
    bytes_given: int = 0

    def __call__(self, path: str, limit: int) -> bytes:
        """A Fetch, as bounded as every fetcher is."""
        if self.down:
            raise ConnectionError("the mirror is down")
        found: Content
        found = self.files[path] if path in self.files else folder_fetch(self.folder)(path, limit)
        if found is None:
            raise FileNotFoundError(path)
        data = found if isinstance(found, bytes) else found(limit + 1)
        self.bytes_given += min(len(data), limit + 1)
        return data[: limit + 1]


@dataclass
class Device:
    """What a device does with an envelope, in the agent's order."""

    root: Path
    root_json: bytes
    mirror: Mirror
    clock: float  # what the system says, which an attacker or a dead battery may set
    uptime: float = 0.0
    state: DeviceState = field(default_factory=DeviceState)

    def __post_init__(self) -> None:
        self.boot()

    def boot(self) -> None:
        """Begin a new life of the process."""
        self.trust = Trust(self.root, self.root_json, self.mirror, monotonic=lambda: self.uptime)
        self.intake = Intake(
            [self.trust], lambda folder: self.trust, DEVICE, [GROUP], lambda release: "",
            lambda result: None,
        )  # fmt: skip

    def refresh(self) -> Refreshed:
        """Ask the mirror for news, and remember as the intake does until when they are news."""
        known = self.trust.refresh(self.clock)
        self.intake.fresh_until = known.fresh_until
        return known

    def is_stale(self, system: float) -> bool:
        """Whether it notices, at this time, that news may be kept from it."""
        return self.intake.is_stale(system)

    def take(self, envelope: bytes) -> Order:
        """Take an order up.

        Raises:
            UpdateRefused: when it is not taken up, with the reason.
        """
        known = self.refresh()
        order = orders.verify(envelope, known.order_keys, known.now.time)
        if not order.concerns(DEVICE, [GROUP]):
            raise UpdateRefused("the order is for others", reason="not-concerned")
        release, _ = self.trust.release(order.bundle, order.version, order.release_sha256)
        target = Slot(
            release.name, release.version, release.seq, order.release_sha256,
            release.manifest.sha256,
        )  # fmt: skip
        before = self.state.update
        self.state, effects = update(self.state, Ordered(order, target), known.now.time)
        for effect in effects:
            if isinstance(effect, RaiseFloor):
                raise_floor(RealFiles(self.root), orders=effect.seqs, releases=effect.floors)
        verdict = self.state.verdict(order.order)
        if verdict is not None and verdict.state == "REJECTED":
            raise UpdateRefused("rejected", reason=str(verdict.evidence["reason"]))
        if self.state.update == before:
            raise UpdateRefused("nothing came of it", reason="replayed")
        return order

    def lose(self, *names: str) -> None:
        """Lose files and folders below the root, as a broken disk would."""
        for name in names:
            path = self.root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@dataclass
class Siege:
    """Everything an attack may touch. `old` is the repository as it was a release ago."""

    base: Path
    rng: random.Random
    repository: Repository
    keys: KeyFolders
    mirror: Mirror
    device: Device
    now: float
    old: Path

    @property
    def metadata(self) -> Path:
        """The honest repository's metadata."""
        return self.repository.folder / "metadata"

    def current(self) -> SignedMetadata:
        """What the honest repository says now."""
        return SignedMetadata(self.metadata)

    def pass_time(self, seconds: float) -> None:
        """Move every clock."""
        self.now += seconds
        self.device.clock += seconds
        self.device.uptime += seconds

    def publish(self, version: str) -> str:
        """A further honest release; its SHA-256."""
        return publish(self.repository, version, self.rng, self.now)

    def order(self, version: str = "2.0", **changes: Any) -> Order:
        """An honest order, not yet signed."""
        _, sha256 = self.repository.release(NAME, version)
        made = Order(
            order=f"to-{version}".replace(".", "-"), seq=self.repository.next_seq(GROUP),
            group=GROUP, bundle=NAME,
            version=version, release_sha256=sha256, not_before=self.now - 60,
            expires=self.now + 5 * DAY_S,
        )  # fmt: skip
        return replace(made, **changes)

    def signed(self, version: str = "2.0", **changes: Any) -> bytes:
        """An honest order, signed."""
        return self.repository.sign_order(self.order(version, **changes))

    def stolen(self, role: str, count: int) -> list[Key]:
        """Some of a role's keys, in the attacker's hands."""
        return self.keys.keys(role)[:count]

    def foreign(self, role: str, count: int = 1) -> list[Key]:
        """Keys of the attacker's own."""
        own = KeyFolders([self.base / "thief"])
        return [own.generate(role) for _ in range(count)]

    def forgery(self) -> SignedMetadata:
        """A copy of the repository for the attacker to change; the mirror shows it from now on."""
        copy = self.base / "forged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.repository.folder, copy)
        self.mirror.folder = copy
        return SignedMetadata(copy / "metadata")

    def end(self) -> None:
        """The attacker is gone; the operator renews what expired."""
        self.mirror.folder = self.repository.folder
        self.mirror.files.clear()
        self.mirror.down = False
        self.repository.refresh(self.now)

    def floor(self) -> dict[str, int]:
        """All numbers of the floor that must not sink while no key is replaced."""
        found = read_floor(RealFiles(self.device.root))
        versions = {
            role: getattr(found.metadata, role)
            for role in ("root", "timestamp", "snapshot", "targets")
        }
        return {**versions, **{f"order {k}": v for k, v in found.orders.items()}}


def publish(repository: Repository, version: str, rng: random.Random, now: float) -> str:
    """A release of random content, without its blobs: nothing here downloads one."""

    def ref(path: str) -> FileRef:
        data = rng.randbytes(32)
        return FileRef(path, rng.randrange(1 << 20), hashlib.sha256(data).hexdigest())

    files = (ref("report.json"), ref("weights-00001-of-00001.safetensors"))
    known = repository.releases().get(NAME, [])
    made = Release(NAME, version, len(known) + 1, ref("manifest.json"), files)
    return repository.sign_release(made, now)


class Camp:
    """A repository with two releases and a device that knows them, copied for each attack."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        keys = KeyFolders([folder / "keys"])
        repository = Repository.init(
            folder / "repository", keys, START, profile=PLAN, operators=("alice", "bob")
        )
        publish(repository, "1.0", rng, START)
        shutil.copytree(repository.folder, folder / "old")
        publish(repository, "2.0", rng, START + 60)
        (folder / "device").mkdir()
        Trust(folder / "device", self._root(folder), folder_fetch(repository.folder)).refresh(
            START + 120
        )

    @staticmethod
    def _root(folder: Path) -> bytes:
        return (folder / "old" / "metadata" / "1.root.json").read_bytes()

    @contextmanager
    def siege(self, rng: random.Random) -> Iterator[Siege]:
        """A copy that one attack may ruin."""
        with tempfile.TemporaryDirectory(prefix="siege-", dir=self.folder.parent) as name:
            base = Path(name) / "camp"
            shutil.copytree(self.folder, base, symlinks=True)
            keys = KeyFolders([base / "keys"])
            repository = Repository(base / "repository", keys)
            mirror = Mirror(repository.folder)
            now = START + 180
            device = Device(base / "device", self._root(base), mirror, now)
            yield Siege(base, rng, repository, keys, mirror, device, now, base / "old")


def run_each(
    names: Sequence[str],
    tried: Callable[[Camp, str], str],
    what: str,
    seed: int,
    count: int,
    case: str | None,
) -> Outcome:
    """Each name in turn, with other numbers each time; a case is NAME:SEED."""
    rounds = -(-count // len(names))
    every = [f"{name}:{seed + i}" for i in range(rounds) for name in names]
    some = random.Random(seed).sample(every, count) if count < len(names) else every[:count]
    cases = [case] if case else some
    failures = []
    with tempfile.TemporaryDirectory(prefix=f"{what}-", dir=FOLDER) as folder:
        camp = Camp(Path(folder) / "camp", random.Random(seed))
        for each in cases:
            if message := tried(camp, each):
                failures.append(Failure(each, message))
    return Outcome(len(cases), tuple(failures), notes={what: len(names)})
