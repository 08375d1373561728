# SPDX-License-Identifier: Apache-2.0
"""F12: clocks that wake up in 1970, jump by years, step back in the middle of an update, and change
to summer time in the middle of a window.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from edgecascade.errors import EdgeCascadeError, FleetError
from edgecascade.fleet.clock import trusted_now
from edgecascade.fleet.events import Report
from edgecascade.fleet.faults import Outcome
from edgecascade.fleet.faults.siege import DAY_S, FOLDER, START, Camp, Siege, run_each
from edgecascade.fleet.faults.world import (
    NOW,
    Device,
    Violation,
    World,
    check_device,
    installed,
    last_word,
    order_for,
    publish,
    require,
)
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.orders import Window
from edgecascade.fleet.state import Phase

TITLE = "clocks"
FULL = 112
SHORT = 14

YEAR_S = 365.25 * DAY_S
ZONES = (
    "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago",
    "Asia/Kolkata", "Pacific/Apia", "UTC",
)  # fmt: skip


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """Every kind of clock."""
    return run_each(CASES, tried, "clocks", seed, count, case)


def tried(camp: Camp, case: str) -> str:
    """What went wrong in one case; empty when all was well."""
    name, _, seed = case.partition(":")
    rng = random.Random(case)
    try:
        if name in METADATA:
            with camp.siege(rng) as siege:
                METADATA[name](siege)
        elif name.startswith("step"):
            _, jump, phase = name.split("/")
            with tempfile.TemporaryDirectory(prefix="step-", dir=FOLDER) as folder:
                _step(Path(folder), rng, JUMPS[jump], Phase(phase))
        else:
            _windows(rng, ZONES[int(seed) % len(ZONES)], name)
    except (EdgeCascadeError, Violation) as error:
        return str(error)
    return ""


def _refused(siege: Siege, reason: str) -> None:
    try:
        siege.device.refresh()
    except FleetError as error:
        require(error.reason == reason, f"refused as {error.reason}; expected {reason}: {error}")
        return
    raise Violation(f"accepted; expected {reason}")


def _wakes_at(clock: float) -> Callable[[Siege], None]:
    def case(siege: Siege) -> None:
        siege.device.clock = clock
        siege.device.boot()
        known = siege.device.refresh()
        require(known.now.suspect, "a clock in the past is not noticed")
        require(known.now.time >= START, f"it is believed to be {known.now.time}")
        siege.device.take(siege.signed())

    return case


def _first_boot_in_1970(siege: Siege) -> None:
    """No floor, no clock: the first metadata tell the time."""
    siege.device.lose("tuf", "belief", "floor-a", "floor-b")
    siege.device.clock = siege.rng.uniform(0, YEAR_S)
    siege.device.boot()
    siege.device.refresh()
    require(siege.device.trust.now(0).time >= START, "the signer's date is not used")
    siege.device.take(siege.signed(not_before=0))


def _frozen_in_1970(siege: Siege) -> None:
    """Without a clock, metadata still expire: uptime counts."""
    siege.device.clock = 0.0
    siege.device.boot()
    siege.device.refresh()
    siege.device.uptime += siege.rng.uniform(1.1, 5) * DAY_S
    require(siege.device.is_stale(0.0), "a device without a clock does not notice silence")
    _refused(siege, "expired-metadata")


def _expired_order_in_1970(siege: Siege) -> None:
    """An order that was over when the metadata were signed is over, whatever the clock says."""
    envelope = siege.signed(not_before=0, expires=START - siege.rng.uniform(1, 30) * DAY_S)
    siege.device.clock = siege.rng.uniform(0, YEAR_S)
    siege.device.boot()
    try:
        siege.device.take(envelope)
    except FleetError as error:
        require(error.reason == "expired", f"refused as {error.reason}")
        return
    raise Violation("an expired order is taken")


def _old_repository_in_1970(siege: Siege) -> None:
    siege.mirror.folder = siege.old
    siege.device.clock = 0.0
    siege.device.boot()
    _refused(siege, "rollback")


def _years_ahead(siege: Siege) -> None:
    """All has expired; when the clock is right again, nothing is left of it."""
    right = siege.device.clock
    siege.device.clock += siege.rng.choice([1.0, 10.0, 100.0, 7000.0, 1e9]) * YEAR_S
    _refused(siege, "expired-metadata")
    siege.device.clock = right
    require(not siege.device.refresh().now.suspect, "the wrong time is remembered")
    siege.device.take(siege.signed())


def _hours_ahead(siege: Siege) -> None:
    """Ahead, but before all expires: accepted, and no harm when it is set back."""
    siege.device.clock += siege.rng.uniform(1, 20) * 3600
    siege.device.refresh()
    siege.device.clock -= 20 * 3600
    siege.device.take(siege.signed())


def _boots_before_it_went_down(siege: Siege) -> None:
    """A clock that goes on from the last shutdown, months later, until NTP sets it."""
    away = siege.rng.uniform(30, 80) * DAY_S
    siege.now += away
    siege.repository.refresh(siege.now)
    siege.device.boot()
    siege.device.refresh()
    siege.device.clock += away
    siege.device.take(siege.signed())


METADATA: dict[str, Callable[[Siege], None]] = {
    "wakes-in-1970": _wakes_at(0.0),
    "wakes-in-1980": _wakes_at(10 * YEAR_S),
    "wakes-before-1970": _wakes_at(-1e9),
    "wakes-without-a-number": _wakes_at(float("nan")),
    "wakes-a-day-early": _wakes_at(START - DAY_S),
    "first-boot-in-1970": _first_boot_in_1970,
    "frozen-in-1970": _frozen_in_1970,
    "expired-order-in-1970": _expired_order_in_1970,
    "old-repository-in-1970": _old_repository_in_1970,
    "years-ahead": _years_ahead,
    "hours-ahead": _hours_ahead,
    "boots-before-it-went-down": _boots_before_it_went_down,
}


JUMPS = {
    "to-1970": -NOW,
    "a-day-back": -DAY_S,
    "an-hour-back": -3600.0,
    "an-hour-ahead": 3600.0,
    "ten-years-ahead": 10 * YEAR_S,
}


class Jumpy(Device):
    """A device whose clock jumps when a phase begins."""

    offset = 0.0
    jump = 0.0
    phase: Phase | None = None

    def now(self) -> float:
        """What an agent passes on: the trusted time."""
        elapsed = self.world.now - NOW
        return trusted_now(self.world.now + self.offset, NOW, elapsed).time

    def report(self, report: Report, revision: int) -> None:
        """See Host."""
        if self.phase is not None and report.phase == self.phase.value:
            self.offset, self.phase = self.jump, None
        super().report(report, revision)


def _step(folder: Path, rng: random.Random, jump: float, phase: Phase) -> None:
    first, second, third = (publish(rng, seq) for seq in (1, 2, 3))
    world = World([first, second, third], room_for_two=phase is Phase.REHEARSING)
    files = RealFiles(folder)
    installed(files, world, first, 1)
    device = Jumpy(files, world)
    device.boot()
    device.jump, device.phase = jump, phase
    hours = Window("UTC", "00:00", 1440) if phase is Phase.WAITING else None
    device.deliver(order_for(second, 2, window=hours), second)
    check_device(device)
    word = last_word(world, "order-2")
    require(word is not None, "nothing was reported")
    assert word is not None
    if jump < YEAR_S:
        require(word.state == "SUCCEEDED", f"{word.state}: {word.evidence}")
    else:
        require(word.state in ("SUCCEEDED", "CANCELED"), f"{word.state}: {word.evidence}")
    device.offset = 0.0
    device.deliver(replace(order_for(third, 3), expires=NOW + 1e9), third)
    require(device.state.active == third.slot, "the next update does not come through")


def _windows(rng: random.Random, zone: str, kind: str) -> None:
    """A window opens once on each of its days, for its minutes, whatever the clocks do there."""
    start = "02:30" if kind == "window-in-the-hour-that-is-skipped" else (
        f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    )  # fmt: skip
    days = tuple(sorted(rng.sample(range(7), rng.randint(1, 7)))) if "days" in kind else ()
    window = Window(zone, start, rng.choice([1, 30, 180, 1440]), days)
    begin = datetime(2026, rng.randint(1, 12), rng.randint(1, 28), tzinfo=ZoneInfo(zone))
    now = begin.timestamp() + rng.uniform(0, DAY_S)
    for _ in range(20):
        opens = window.next_open(now)
        require(opens >= now, f"{window} opened before {now}")
        require(window.is_open(opens), f"{window} is not open at {opens}")
        if opens > now:
            require(not window.is_open(now), f"{window} is open at {now} already")
            require(not window.is_open(opens - 0.001), f"{window} opens before {opens}")
            closes = opens + 60 * window.minutes
            require(window.is_open(closes - 0.001), f"{window} closes before {closes}")
            day = datetime.fromtimestamp(opens, ZoneInfo(zone))
            require(not days or day.weekday() in days, f"{window} opens on {day}")
        now = opens + 60 * window.minutes + rng.uniform(0, DAY_S)


CASES = [
    *METADATA,
    *(f"step/{jump}/{phase.value}" for jump in JUMPS for phase in Phase),
    *(
        "window", "window-with-days", "window-in-the-hour-that-is-skipped",
        "window-with-days-in-another-zone",
    ),
]  # fmt: skip
