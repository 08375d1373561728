# SPDX-License-Identifier: Apache-2.0
"""F1: power cuts at every effect of an update, in all that an un-synced file system may leave."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgecascade.errors import EdgeCascadeError
from edgecascade.fleet.events import Report
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.sim import SimFiles
from edgecascade.fleet.faults.watched import Watched
from edgecascade.fleet.faults.world import (
    Device,
    Published,
    Violation,
    World,
    check_device,
    check_nothing_more,
    installed,
    last_word,
    order_for,
    publish,
    require,
    seeds,
    wrong_with,
)
from edgecascade.fleet.fs import Files
from edgecascade.fleet.orders import Order, Policy
from edgecascade.fleet.state import Slot

TITLE = "power cuts at every effect, and during the recovery"
FULL = 20_000
SHORT = 500

KINDS = ("good", "bad", "config", "first", "beside", "bad-beside", "back")
STATES_PER_POINT = 8  # at most
POINTS = 500  # of all kinds with one seed, roughly
SECOND_CUTS = 7  # one state in so many is cut again while it recovers
LAST_EFFECT = 40  # of a recovery, at which the second cut may come


class Cut(BaseException):
    """The power goes. No `except Exception` may stop it."""


@dataclass
class Scenario:
    """An update that is about to begin, on a device that is otherwise at rest."""

    kind: str
    files: SimFiles
    world: World
    before: Published | None
    after: Published
    order: Order

    @classmethod
    def make(cls, kind: str, seed: int) -> Scenario:
        """The scenario of a seed."""
        rng = random.Random(seed)
        old = publish(rng, 1)
        new = publish(rng, 2, base=old, config_only=kind == "config")
        world = World([old, new], room_for_two=kind.endswith("beside"))
        files = SimFiles()
        order = order_for(new, 2)
        if kind != "first":
            installed(files, world, old, 1)
        if kind == "back":  # from the new release to the old one
            Device(files, world).boot().deliver(order, new)
            order = replace(order, seq=3, action="rollback")
        return cls(kind, files.copy(), world, None if kind == "first" else old, new, order)

    @property
    def healthy(self) -> bool:
        """Whether the new release passes its trial."""
        return not self.kind.startswith("bad")

    def device(self, files: Files) -> Device:
        """A process on these files, in a world that knows nothing yet."""
        world = World(
            self.world.published,
            healthy=lambda slot: self.healthy or slot != self.after.slot,
            room_for_two=self.world.room_for_two,
        )
        return Device(files, world)

    def run(self, files: Files) -> Device:
        """Boot, take the order, and let all follow."""
        device = self.device(files).boot()
        device.settle()
        install = self.order.action == "install"
        device.deliver(self.order, self.after if install else None)
        return device

    def effects(self) -> int:
        """How many effects the update has when nothing disturbs it."""
        seen: list[str] = []
        self.run(Watched(self.files.copy(), seen.append))
        return len(seen)

    def check(self, files: Files, *, cuts: int) -> None:
        """A device that comes back from a power cut ends where it must."""
        device = self.device(files).boot()
        device.settle()
        possible = [None if self.before is None else self.before.slot, self.after.slot]
        require(device.state.active in possible, f"it runs {device.state.active}")
        device = self.run(files)
        ended = last_word(device.world, self.order.order)
        require(ended is not None, "nothing was reported")
        if ended is not None and ended.evidence.get("reason") == "interrupted":
            require(cuts > 1, "one power cut was taken for two")
            check_device(device)
            goal = self.before if self.kind == "back" and self.before else self.after
            again = order_for(goal, 9, policy=Policy(allow_downgrade=True))
            device.deliver(again, goal)
            ended = last_word(device.world, again.order)
        self._check_end(device, ended)
        check_device(device)
        check_nothing_more(device)
        self._check_downgrade(device)

    def _check_end(self, device: Device, ended: Report | None) -> None:
        active = device.state.active
        expected = self._expected()
        require(active == expected, f"it ends on {active}, with {ended}")
        words = "SUCCEEDED" if self.healthy else "FAILED"
        if self.kind == "back" and ended is not None and ended.order == self.order.order:
            words = "CANCELED"
        require(ended is not None and ended.state == words, f"it reports {ended}")

    def _expected(self) -> Slot | None:
        before = None if self.before is None else self.before.slot
        if self.kind == "back":
            return before
        return self.after.slot if self.healthy else before

    def _check_downgrade(self, device: Device) -> None:
        if self.before is None or device.state.floors.get("model", 0) < 2:
            return
        active = device.state.active
        older = order_for(self.before, 20)
        device.deliver(older, self.before)
        word = last_word(device.world, older.order)
        same = active == self.before.slot
        good = word is not None and word.state == ("SUCCEEDED" if same else "REJECTED")
        require(good and device.state.active == active, f"an older release got {word}")


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    tried, failures, points = 0, [], 0
    most = max(1, min(STATES_PER_POINT, count // POINTS))
    for number in seeds(seed, case):
        for kind in KINDS:
            if case is not None and not case.startswith(f"{kind}/{number}/"):
                continue
            for name, files, cuts, scenario in crash_states(kind, number, most, case):
                tried += 1
                points += cuts == 1
                if message := wrong_with(scenario.check, files, cuts=cuts):
                    failures.append(Failure(name, message))
        if tried >= count or case is not None:
            return Outcome(tried, tuple(failures), notes={"second cuts": tried - points})
    raise AssertionError("seeds have no end")


def crash_states(
    kind: str, seed: int, most: int, case: str | None = None
) -> Iterator[tuple[str, SimFiles, int, Scenario]]:
    """Every state that is tried of one update: its name, its files, how many cuts made it."""
    scenario = Scenario.make(kind, seed)
    states: list[tuple[str, SimFiles]] = []
    points = itertools.count()
    files = scenario.files.copy()

    def before(effect: str) -> None:
        point = f"{kind}/{seed}/{next(points)}"
        if case is None or case.startswith(f"{point}/"):
            for index, left in enumerate(files.power_cuts(random.Random(point), most)):
                states.append((f"{point}/{index}", left))

    files.before = before
    scenario.run(files)
    before("the end")
    for name, left in states:
        if zlib.crc32(name.encode()) % SECOND_CUTS == 0:
            yield from (
                (again, twice, 2, scenario)
                for again, twice in _second_cuts(scenario, name, left)
                if case in (None, again)
            )
        if case in (None, name):
            yield name, left, 1, scenario


def _second_cuts(scenario: Scenario, name: str, files: SimFiles) -> Iterator[tuple[str, SimFiles]]:
    rng = random.Random(name)
    stop = rng.randint(1, LAST_EFFECT)
    recovering, effects = files.copy(), 0

    def before(effect: str) -> None:
        nonlocal effects
        effects += 1
        if effects == stop:
            raise Cut

    recovering.before = before
    try:
        scenario.run(recovering)
    except (Violation, EdgeCascadeError, OSError):
        return  # the check of the first cut finds it, too
    except Cut:
        recovering.before = None
        for index, left in enumerate(recovering.power_cuts(rng, 2)):
            yield f"{name}/{stop}.{index}", left
