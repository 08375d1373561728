# SPDX-License-Identifier: Apache-2.0
"""F6: a disk that is full, broken or read-only, at every effect and every read of an update."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Scenario
from edgecascade.fleet.faults.sim import ENDLESS, SimFiles
from edgecascade.fleet.faults.watched import Watched, write_out
from edgecascade.fleet.faults.world import (
    Device,
    check_device,
    check_nothing_more,
    last_word,
    order_for,
    require,
    seeds,
    wrong_with,
)
from edgecascade.fleet.fs import Files, RealFiles

TITLE = "ENOSPC, EDQUOT, EIO, EROFS and EMFILE at every effect and read"
FULL = 600
SHORT = 60

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE")
# How many effects fail from the chosen one on: one, or all for a while.
LENGTHS = (1, 8)
SIZES = 16  # of a real file system that is nearly full


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    tried, failures = 0, []
    notes = {}
    for number in seeds(seed, case):
        for kind in ("good", "bad"):
            scenario = Scenario.make(kind, number)
            for name, files in _cases(scenario, number, count):
                if case not in (None, name):
                    continue
                tried += 1
                if message := wrong_with(_survives, scenario, files):
                    failures.append(Failure(name, message))
                if tried >= count and case is None:
                    break
        if tried >= count or case is not None:
            break
    if case is None or case.startswith("tmpfs/"):
        more = _on_tmpfs(seed, max(2, SIZES * count // FULL), case)
        tried += more.tried
        failures += more.failures
        notes = {"tmpfs": more.skipped or more.tried}
    return Outcome(tried, tuple(failures), notes=notes)


class Broken:
    """Raises an error for some effects, then works again."""

    def __init__(self, name: str, first: int, length: int) -> None:
        self.error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        self.first, self.length = first, length
        self.seen = 0

    def __call__(self, effect: str) -> None:
        """Before an effect."""
        self.seen += 1
        if self.first <= self.seen < self.first + self.length:
            raise self.error


def _cases(scenario: Scenario, seed: int, count: int) -> Iterator[tuple[str, Files]]:
    """Errors at every effect and read, and disks of every size that is nearly enough."""
    whole = Broken("EIO", 1 << 30, 1)
    scenario.run(Watched(scenario.files.copy(), whole, reads=True))
    rng = random.Random(f"{scenario.kind}/{seed}")
    every = [
        (name, at, length)
        for at in range(1, whole.seen + 1)
        for name in ERRORS
        for length in LENGTHS
    ]
    rng.shuffle(every)
    for name, at, length in every[: count // 2 + 1]:
        files = Watched(scenario.files.copy(), Broken(name, at, length), reads=True)
        yield f"{scenario.kind}/{seed}/{name}/{at}/{length}", files
    used = scenario.files.used_bytes()
    for spare in range(0, 24_000, 1500):
        small = scenario.files.copy()
        small.capacity_bytes = used + spare
        yield f"{scenario.kind}/{seed}/size/{spare}", small


def _survives(scenario: Scenario, files: Files) -> None:
    """A device meets a broken disk, which works again after a while."""
    device = scenario.device(files)
    device.world.running = None if scenario.before is None else scenario.before.slot
    device.boot()
    device.deliver(scenario.order, scenario.after)
    device.settle()
    require(device.world.running is not None, "no release answers")
    require(device.state.update is None, "the update does not end")
    _heal(files)
    _ends_well(scenario, device)


def _heal(files: Files) -> None:
    if isinstance(files, Watched):
        files.before = lambda effect: None
    elif isinstance(files, SimFiles):
        files.capacity_bytes = ENDLESS


def _ends_well(scenario: Scenario, device: Device) -> None:
    """By itself, or, where the order was ended for the disk's sake, by the next order."""
    again = scenario.device(device.files).boot()
    again.settle()
    again.deliver(scenario.order, scenario.after)
    word = last_word(again.world, scenario.order.order)
    reason = "" if word is None else word.evidence.get("reason", "")
    if reason in ("disk-full", "disk-failed", "interrupted", "incomplete", "damaged"):
        again.deliver(order_for(scenario.after, 9), scenario.after)
    before = None if scenario.before is None else scenario.before.slot
    expected = scenario.after.slot if scenario.healthy else before
    require(again.state.active == expected, f"it ends on {again.state.active} after {word}")
    check_device(again)
    check_nothing_more(again)


def _on_tmpfs(seed: int, count: int, case: str | None) -> Outcome:
    """The same on a real file system that is filled to the last kilobytes."""
    if os.geteuid() != 0:
        return Outcome(skipped="needs root")
    tried, failures = 0, []
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        folder = Path(base) / "disk"
        folder.mkdir()
        for spare in range(0, 4 * count, 4):
            name = f"tmpfs/{spare}"
            if case not in (None, name):
                continue
            try:
                _mount("-t", "tmpfs", "-o", "size=256k", "none", str(folder))
            except subprocess.CalledProcessError as error:
                return Outcome(skipped=error.stderr.decode(errors="replace").strip())
            try:
                tried += 1
                if message := wrong_with(_on_full_disk, seed, folder, spare << 10):
                    failures.append(Failure(name, message))
            finally:
                subprocess.run(["umount", str(folder)], check=True)
    return Outcome(tried, tuple(failures))


def _on_full_disk(seed: int, folder: Path, spare_bytes: int) -> None:
    scenario = Scenario.make("good", seed)
    write_out(scenario.files, folder / "device")
    files = RealFiles(folder / "device")
    with open(folder / "ballast", "wb") as ballast:
        ballast.write(bytes(max(0, files.free_bytes() - spare_bytes)))
    device = scenario.device(Watched(files)).boot()
    device.deliver(scenario.order, scenario.after)
    device.settle()
    require(device.world.running is not None, "no release answers")
    (folder / "ballast").unlink()
    device.executor.tick()
    device.settle()
    require(last_word(device.world, scenario.order.order), "the order is lost")
    _ends_well(scenario, device)


def _mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)
