# SPDX-License-Identifier: Apache-2.0
"""F13: rollouts to fleets that fail, vanish, sleep and come back, by a controller that restarts.

Each case is a fleet with its own rates of failure, silent loss and absence. The controller sees
only what devices report, forgets what a killed process forgets, and must keep three promises:
nobody outside the stage takes the bundle, a rollout that hurts ends while it is small, and one that
does not ends with everybody on the new bundle. In some cases the broker's owner shows successes
only: failed devices look as if they were off. Then no stage may widen.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from edgecascade.fleet import rollout
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.rollout import Plan, Progress, Seen, Thresholds
from edgecascade.fleet.state import Phase

TITLE = "rollouts: failing, lost and sleeping devices, a controller that restarts"
FULL = 200
SHORT = 10
DEVICES = 10_000
SMALL = (1, 2, 3, 7, 20, 113)  # fleets where a percentage is less than a device
LIMITS = Thresholds(lost_s=900.0, soak_s=60.0)
TICK_S = 120.0
MOST_TICKS = 200
PATIENCE = 10  # ticks that an operator waits for silent devices before going on without them
SLACK = 0.05  # of the fleet: how far a stage drawn by hash may exceed its percentage
FETCHING = Job("order", 1, "device", "IN_PROGRESS", Phase.DOWNLOADING.value)
ON_TRIAL = Job("order", 1, "device", "IN_PROGRESS", Phase.PROBATION.value)
SUCCEEDED = Job("order", 1, "device", "SUCCEEDED")
FAILED = Job("order", 1, "device", "FAILED")


@dataclass(frozen=True)
class World:
    """What happens to the devices of one case."""

    devices: int
    fails: float
    vanishes: float
    absent: float
    returns: bool  # whether absent devices come back
    restarts: float  # of the controller, per tick
    censored: bool  # the broker passes on successes only


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """Try rollouts; a case is its number."""
    numbers = range(count) if case is None else (int(case),)
    failures = []
    aborted = 0
    for number in numbers:
        random = Random(f"{seed}:{number}")
        world = draw(random, number)
        simulation = Simulation(world, random)
        message = simulation.run()
        aborted += simulation.progress.state == "aborted"
        if message:
            failures.append(Failure(str(number), f"{message}; {world}"))
    return Outcome(len(numbers), tuple(failures), notes={"aborted": aborted})


def draw(random: Random, number: int) -> World:
    """Failure rates run over 0 to 100 %; every fifth fleet is small."""
    return World(
        devices=random.choice(SMALL) if number % 5 == 4 else DEVICES,
        fails=random.choice((0.0, 0.0, 0.01, random.random() ** 2, random.random(), 1.0)),
        vanishes=random.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.3)),
        absent=random.choice((0.0, 0.0, 0.1, 0.6)),
        returns=random.random() < 0.5,
        restarts=random.choice((0.0, 0.1, 0.5)),
        censored=random.random() < 0.25,
    )


class Simulation:
    """One rollout: devices on a virtual clock on one side, the controller on the other."""

    def __init__(self, world: World, random: Random) -> None:
        self.world, self.random = world, random
        self.plan = Plan("order", thresholds=LIMITS)
        self.progress = Progress(seq=1)
        self.now = 1_000_000.0
        self.exposed = 0
        self.held = 0
        self.outside = 0  # devices that took the bundle though no stage had reached them
        self.true: dict[str, Seen] = {}  # what the broker retains
        self._taken: set[str] = set()
        self._events: list[tuple[float, int, str, Job]] = []
        for n in range(world.devices):
            online = random.random() >= world.absent
            self.true[f"device-{n}"] = Seen(point=100 * random.random(), online=online)
        self.fleet = dict(self.true)  # what the controller has heard

    def run(self) -> str:
        """What went wrong, or nothing."""
        for _ in range(MOST_TICKS):
            self._report()
            if self.random.random() < self.world.restarts:
                self._restart()
            before = self.progress
            self.progress = rollout.step(self.plan, before, self.fleet, self.now)
            if message := self._judge(before):
                return message
            if self.progress.ended:
                return self._end()
            self._go_on(before)
            if self.progress.seq != before.seq:
                self._announce()
            self.now += TICK_S
        return "" if self._may_wait() else f"no end in {MOST_TICKS} ticks: {self.progress}"

    def _go_on(self, before: Progress) -> None:
        """The operator goes on without devices that stay silent, unless there is a doubt."""
        count = rollout.tally(self.plan, self.progress, self.fleet, self.now)
        held = self.progress == before and count.settled and count.silent and count.succeeded
        self.held = self.held + 1 if held else 0
        if self.held > PATIENCE and not self.world.censored:
            paused = rollout.pause(self.progress, self.now)
            self.progress = rollout.resume(self.plan, paused, self.fleet, self.now)

    def _announce(self) -> None:
        """Devices that the order concerns begin, each in its own time."""
        for name in rollout.members(self.plan, self.progress, self.true):
            if self.true[name].online and name not in self._taken:
                self._taken.add(name)
                for at, job in self._life():
                    heapq.heappush(self._events, (self.now + at, len(self._events), name, job))

    def _life(self) -> Iterator[tuple[float, Job]]:
        random, world = self.random, self.world
        yield (at := random.uniform(1, 300)), FETCHING
        yield (at := at + random.uniform(1, 900)), ON_TRIAL
        if random.random() >= world.vanishes:  # else not a word more
            job = FAILED if random.random() < world.fails else SUCCEEDED
            yield at + random.uniform(60, 400), job

    def _report(self) -> None:
        """What became of devices since the last tick; some come back."""
        percent = self.plan.stages[self.progress.stage]
        while self._events and self._events[0][0] <= self.now:
            _, _, name, job = heapq.heappop(self._events)
            point = self.true[name].point
            self.true[name] = Seen(point, True, job=job, heard=self.now)
            shown = job is SUCCEEDED or not self.world.censored
            self.fleet[name] = self.true[name] if shown else Seen(point)
            if job is ON_TRIAL:
                self.exposed += 1
                self.outside += point >= percent and name != self.progress.first
        if self.world.returns and self.random.random() < 0.02:
            for name, seen in self.true.items():
                if not seen.online:
                    self.true[name] = self.fleet[name] = replace(seen, online=True)
            if self.progress.first:
                self._announce()

    def _restart(self) -> None:
        """Only the plan's file and what the broker retains survive."""
        self.progress = Progress(**json.loads(json.dumps(vars(self.progress))))
        if not self.world.censored:
            self.fleet = dict(self.true)

    def _judge(self, before: Progress) -> str:
        """Promises that hold at every moment."""
        if self.outside:
            return f"{self.outside} devices beyond the stage took the bundle"
        percent = self.plan.stages[self.progress.stage]
        most = self.world.devices * (percent / 100 + SLACK)
        if self.world.devices == DEVICES and self.exposed > most:
            return f"{self.exposed} devices took the bundle in the stage of {percent:g} %"
        if self.progress.seq < before.seq or self.progress.stage < before.stage:
            return f"went back from {before} to {self.progress}"
        if before.first and self.progress.stage > before.stage:
            good, asked = self._truth(before)
            if good < LIMITS.success * asked:
                return f"widened after {good} of {asked} succeeded"
        return ""

    def _truth(self, progress: Progress) -> tuple[int, int]:
        """Successes in a stage as they are, and devices that the operator has not left out."""
        count = rollout.tally(self.plan, progress, self.true, self.now)
        return count.succeeded, count.asked

    def _end(self) -> str:
        """Promises about the end."""
        world, state = self.world, self.progress.state
        good, asked = self._truth(self.progress)
        if not world.fails and not world.vanishes and state != "done":
            return f"nothing failed, but the rollout is {state}: {self.progress.reason}"
        if state == "done" and good < LIMITS.success * asked:
            return f"done with {good} of {asked}"
        if world.devices == DEVICES and world.fails >= 0.2 and self.exposed > SLACK * DEVICES:
            return f"{self.exposed} devices took a bundle that fails {world.fails:.0%}"
        return ""

    def _may_wait(self) -> bool:
        """Nobody is there to begin with, or what became of them is hidden: waiting is right."""
        return self.world.censored or not any(seen.online for seen in self.true.values())
