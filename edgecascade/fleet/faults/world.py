# SPDX-License-Identifier: Apache-2.0
"""A device on any `Files`, an operator who orders, and what must hold whatever happens to it.

The updater, executor and store are the real ones. Only what lies beyond them is played: the network
gives bytes from a table, and a bundle is as healthy as the case says.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

from edgecascade.errors import EdgeCascadeError
from edgecascade.fleet.events import Report
from edgecascade.fleet.executor import Executor
from edgecascade.fleet.floor import read_floor
from edgecascade.fleet.fs import Files
from edgecascade.fleet.orders import Order, Policy
from edgecascade.fleet.release import FileRef, Release
from edgecascade.fleet.state import MAX_STATE_BYTES, DeviceState, Slot, read_state
from edgecascade.fleet.store import Store

NOW = 1_800_000_000.0
NAME = "model"
GROUP = "site"
BLOCK = 512  # bytes that a download writes at once
MARGIN_BYTES = 4096
PATIENCE = 60  # ticks until an update must have ended
P = ParamSpec("P")


class Violation(BaseException):
    """Something that must hold does not. No `except Exception` may take it for a failed step."""


def require(good: object, message: str) -> None:
    """An assertion that `python -O` does not remove."""
    if not good:
        raise Violation(message)


def wrong_with(work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> str:
    """What goes wrong when this is done, or nothing."""
    try:
        work(*args, **kwargs)
    except (Violation, EdgeCascadeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Published:
    """A release with its bytes, as a mirror has them."""

    release: Release
    document: bytes
    blobs: Mapping[str, bytes]

    @property
    def sha256(self) -> str:
        """Name of the release document."""
        return hashlib.sha256(self.document).hexdigest()

    @property
    def slot(self) -> Slot:
        """As a device holds it."""
        r = self.release
        return Slot(r.name, r.version, r.seq, self.sha256, r.manifest.sha256)


def publish(
    rng: random.Random, seq: int, *, base: Published | None = None, config_only: bool = False
) -> Published:
    """A release with some files of its own; others, and for a new config all, are the base's."""
    contents: dict[str, bytes] = {}
    if base is not None:
        old = {file.path: base.blobs[file.sha256] for file in base.release.every_file}
        contents = old if config_only else {"generation.json": old["generation.json"]}
    if not config_only:
        names = [f"weights-{i:05}-of-00002.safetensors" for i in (1, 2)]
        for path in ("manifest.json", "generation.json", "report.json", *names):
            contents.setdefault(path, rng.randbytes(rng.randint(200, 1500)))
    refs = [FileRef(path, len(d), hashlib.sha256(d).hexdigest()) for path, d in contents.items()]
    manifest = next(ref for ref in refs if ref.path == "manifest.json")
    others = tuple(ref for ref in refs if ref is not manifest)
    release = Release(NAME, f"{seq}.0", seq, manifest, others, config={"number": seq})
    blobs = {hashlib.sha256(data).hexdigest(): data for data in contents.values()}
    return Published(release, release.to_bytes(), blobs)


def order_for(what: Published, seq: int, name: str = "", **changes: Any) -> Order:
    """An order to install a release."""
    order = Order(
        order=name or f"order-{seq}",
        seq=seq,
        group=GROUP,
        bundle=NAME,
        version=what.release.version,
        release_sha256=what.sha256,
        not_before=0.0,
        expires=NOW + 1e6,
        policy=Policy(retries=3),
    )
    return replace(order, **changes)


@dataclass
class World:
    """Everything outside of the device's folder. `healthy` says how a bundle does when tried."""

    published: list[Published]
    healthy: Callable[[Slot], bool] = lambda slot: True
    room_for_two: bool = False
    before_trial: Callable[[], None] = lambda: None
    now: float = NOW
    wake_at: float | None = None
    running: Slot | None = None
    reports: list[Report] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    check_served: bool = True

    @property
    def last(self) -> Report | None:
        """The latest report."""
        return self.reports[-1] if self.reports else None


class Device:
    """One life of a device's process. It is its own `Host`."""

    def __init__(self, files: Files, world: World) -> None:
        self.files, self.world = files, world
        self.beneath: Files = getattr(files, "files", files)  # where no fault is put in
        self.store = Store(files, MARGIN_BYTES)
        self.executor = Executor(files, self, store=self.store)

    @property
    def state(self) -> DeviceState:
        """What the executor remembers."""
        return self.executor.state

    def boot(self) -> Device:
        """Begin or go on."""
        self.executor.boot()
        return self

    def deliver(self, order: Order, what: Published | None) -> None:
        """An order arrives, and all that follows happens."""
        self.executor.offer(order, what.document if what else None)
        self.settle()

    def settle(self) -> None:
        """Let time pass until nothing is to be done."""
        for _ in range(PATIENCE):
            if self.world.wake_at is None:
                return
            self.world.now = max(self.world.now, self.world.wake_at)
            self.world.wake_at = None
            self.executor.tick()
        if not self.executor.trouble:  # else it waits for the disk
            raise Violation(f"the update does not end: {self.state.update}")

    def now(self) -> float:
        """See Host."""
        return self.world.now

    def report(self, report: Report, revision: int) -> None:
        """See Host. What is said to have ended well must be known after a power cut, too."""
        if report.state in ("SUCCEEDED", "CANCELED"):
            stored = self.beneath.read("state.json", MAX_STATE_BYTES)
            known = None if stored is None else read_state(stored).verdict(report.order)
            require(known and known.state == report.state, f"reported and not stored: {report}")
        self.world.reports.append(report)

    def wake(self, at: float) -> None:
        """See Host."""
        self.world.wake_at = at

    def download(
        self,
        order: Order,
        release: Release,
        missing: Mapping[str, int],
        keep: Callable[[str], None],
    ) -> None:
        """See Host. A part that is there is continued if it begins as the blob does."""
        blobs = {sha: data for each in self.world.published for sha, data in each.blobs.items()}
        for sha256 in missing:
            data, path = blobs[sha256], f"partial/{sha256}"
            begun = self.files.read(path, len(data))
            if begun is None or not data.startswith(begun):
                self.files.create(path, b"")
                begun = b""
            for start in range(len(begun), len(data), BLOCK):
                self.files.append(path, data[start : start + BLOCK])
            self.world.fetched.append(sha256)
            keep(sha256)

    def halt(self) -> None:
        """See Host; nothing runs beside."""

    def room_for_two(self, release: Release) -> bool:
        """See Host."""
        return self.world.room_for_two

    def try_out(self, slot: Slot, release: Release) -> tuple[bool, Mapping[str, Any]]:
        """See Host."""
        self.world.before_trial()
        self._run(slot)
        good = self.world.healthy(slot)
        return good, {"tok_s": 20.0} if good else {"reason": "wrong-answer"}

    def drain(self) -> None:
        """See Host."""
        self.world.running = None

    def start(self, slot: Slot | None) -> None:
        """See Host."""
        if slot is not None:
            self._run(slot)
        self.world.running = slot

    def soak(self, slot: Slot, release: Release) -> tuple[bool, Mapping[str, Any]]:
        """See Host."""
        self.world.before_trial()
        self.start(slot)
        good = self.world.healthy(slot)
        return good, {"soak_s": 1.0} if good else {"reason": "crash-loop"}

    def _run(self, slot: Slot) -> None:
        """What a process that opens the bundle would find."""
        if self.world.check_served:
            wrong = self.damage(slot)
            require(not wrong, f"release {slot.version} was run, but {wrong}")

    def damage(self, slot: Slot) -> str:
        """What is wrong with a bundle's folder, by the published bytes."""
        what = next(each for each in self.world.published if each.slot == slot)
        folder = f"bundles/{slot.manifest}"
        expected = {file.path: file.sha256 for file in what.release.every_file}
        if set(self.beneath.names(folder)) != expected.keys():
            return f"{folder} holds {self.beneath.names(folder)}"
        for path, sha256 in expected.items():
            if self.beneath.read(f"{folder}/{path}", 1 << 30) != what.blobs[sha256]:
                return f"{path} is not what was published"
        return ""


def installed(files: Files, world: World, what: Published, seq: int) -> None:
    """Put a first release on a device."""
    device = Device(files, world).boot()
    device.deliver(order_for(what, seq), what)
    require(device.state.active == what.slot, "the first release was not installed")


def check_device(device: Device) -> None:
    """What holds on any device at rest."""
    state, files = device.state, device.files
    require(state.update is None, f"an update does not end: {state.update}")
    require(device.world.running == state.active, "what runs is not what the state says")
    for slot in state.slots:
        require(not device.damage(slot), f"release {slot.version}: {device.damage(slot)}")
    floor = read_floor(files)
    for name, seq in state.floors.items():
        require(floor.releases.get(name, 0) >= seq, f"the floor {floor} is below {state.floors}")
    for key, seq in state.seqs.items():
        require(floor.orders.get(key, 0) >= seq, f"the floor {floor} is below {state.seqs}")


def check_nothing_more(device: Device) -> None:
    """The disk holds the bundles that the state names, and not a file beyond."""
    slots = device.state.slots
    blobs = {sha for slot in slots for sha in _published(device, slot).blobs}
    expected = {
        "blobs": blobs,
        "bundles": {slot.manifest for slot in slots},
        "releases": {slot.release for slot in slots},
        "partial": set(),
    }
    for folder, names in expected.items():
        extra = set(device.files.names(folder)) - names
        require(not extra, f"{folder} holds {sorted(extra)}, which no bundle needs")


def _published(device: Device, slot: Slot) -> Published:
    return next(each for each in device.world.published if each.slot == slot)


def last_word(world: World, order: str) -> Report | None:
    """The latest report of an order."""
    return next((r for r in reversed(world.reports) if r.order == order), None)


def seeds(seed: int, case: str | None = None) -> Iterator[int]:
    """Seeds of the runs of one class; of a case only the one that its name has."""
    if case is not None:
        yield next((int(part) for part in case.split("/") if part.isdigit()), 0)
        return
    rng = random.Random(seed)
    while True:
        yield rng.randrange(1 << 32)
