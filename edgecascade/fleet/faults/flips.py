# SPDX-License-Identifier: Apache-2.0
"""F7: bits that flip in stored files, and files swapped, cut short, emptied or made links."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Scenario
from edgecascade.fleet.faults.sim import SimFile, SimFiles
from edgecascade.fleet.faults.watched import Watched, write_out
from edgecascade.fleet.faults.world import Device, order_for, require, seeds, wrong_with
from edgecascade.fleet.fs import Files, RealFiles

TITLE = "flipped bits; files swapped, cut, emptied, replaced by links"
FULL = 600
SHORT = 60

LINKS = 0.05  # of all cases: on a real file system, since memory has no links
DAMAGES = ("flip", "flip", "flip", "swap", "cut", "empty")


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    tried, failures = 0, []
    for number in seeds(seed, case):
        for kind, moments in (("after", _after), ("during", _during)):
            for name, scenario, files in moments(number, max(1, count // 6)):
                if case not in (None, f"{kind}/{name}"):
                    continue
                tried += 1
                message = wrong_with(_survives, scenario, files, first=kind == "after")
                if message:
                    failures.append(Failure(f"{kind}/{name}", message))
        links = max(1, int(count * LINKS))
        for name, message in _with_links(number, links, case):
            tried += 1
            failures += [Failure(name, message)] if message else []
        if tried >= count or case is not None:
            return Outcome(tried, tuple(failures))
    raise AssertionError("seeds have no end")


def _updated(seed: int) -> tuple[Scenario, SimFiles]:
    """A device at rest with two releases, the older of them golden."""
    scenario = Scenario.make("good", seed)
    files = scenario.files.copy()
    scenario.run(files)
    return scenario, files.copy()


def _after(seed: int, count: int) -> Iterator[tuple[str, Scenario, SimFiles]]:
    scenario, whole = _updated(seed)
    for index in range(count):
        rng = random.Random(f"after/{seed}/{index}")
        files = whole.copy()
        yield f"{seed}/{index}/{_damage(files, rng)}", scenario, files


def _during(seed: int, count: int) -> Iterator[tuple[str, Scenario, SimFiles]]:
    """Damage to what a power cut left of an update, with all that was written in place."""
    scenario = Scenario.make("good", seed)
    files, states = scenario.files.copy(), []
    files.before = lambda effect: states.append(files.copy())
    scenario.run(files)
    for index in range(count):
        rng = random.Random(f"during/{seed}/{index}")
        left = rng.choice(states).copy()
        yield f"{seed}/{index}/{_damage(left, rng)}", scenario, left


def _damage(files: SimFiles, rng: random.Random) -> str:
    """Do something to a file; in words."""
    stored = [n for n, f in sorted(files.inodes.items()) if isinstance(f, SimFile) and f.seen]
    number, other = rng.choice(stored), rng.choice(stored)
    file = files.inodes[number]
    assert isinstance(file, SimFile)
    how = rng.choice(DAMAGES)
    data = bytearray(file.seen)
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "swap":
        second = files.inodes[other]
        assert isinstance(second, SimFile)
        data, second.seen = bytearray(second.seen), file.seen
        second.durable = second.seen
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data.clear()
    file.seen = file.durable = bytes(data)
    return f"{how}-{number}"


def _survives(scenario: Scenario, files: Files, *, first: bool) -> None:
    """A device finds the damage at its next start."""
    device = scenario.device(files).boot()
    device.settle()
    require(device.world.running == device.state.active, "what runs is not what is active")
    if first and device.state.active is None:
        require(device.world.reports or device.state.seqs, "it neither answers nor reports")
    _mends(scenario, device)


def _mends(scenario: Scenario, device: Device) -> None:
    """The order that is still there, or at worst a later one, brings the release back."""
    device.deliver(scenario.order, scenario.after)
    if device.state.active != scenario.after.slot:
        device.deliver(order_for(scenario.after, 9), scenario.after)
    require(device.state.active == scenario.after.slot, f"it stays on {device.state.active}")
    require(device.world.running == device.state.active, "what runs is not what is active")
    require(not device.damage(scenario.after.slot), device.damage(scenario.after.slot))


def _with_links(seed: int, count: int, case: str | None) -> Iterator[tuple[str, str]]:
    """A stored file is replaced by a link to the same bytes elsewhere, or to nothing."""
    scenario, whole = _updated(seed)
    for index in range(count):
        name = f"link/{seed}/{index}"
        if case not in (None, name):
            continue
        rng = random.Random(name)
        with tempfile.TemporaryDirectory(prefix="faults-") as base:
            folder = Path(base) / "device"
            write_out(whole, folder)
            paths = sorted(p for p in folder.rglob("*") if p.is_file())
            victim = rng.choice(paths)
            elsewhere = Path(base) / "elsewhere"
            if rng.random() < 0.7:
                elsewhere.write_bytes(victim.read_bytes())
            victim.unlink()
            victim.symlink_to(elsewhere)
            yield name, wrong_with(_survives, scenario, Watched(RealFiles(folder)), first=True)
