# SPDX-License-Identifier: Apache-2.0
"""What an operator's terminal shows of devices, whatever they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from edgecascade.cli.screen import TROUBLES, Screen, line, troubled
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.operator import Turn
from edgecascade.fleet.orders import Order
from edgecascade.fleet.record import Record
from edgecascade.fleet.rollout import Plan, Progress, Seen, Tally
from edgecascade.fleet.standing import Standing

NOW = 1_800_000_000.0
FRESH = Standing("r", 1, ts=NOW - 60, fresh_until=NOW + 3600)


def seen(**changes: Any) -> Seen:
    return Seen(1.0, online=changes.pop("online", True), standing=replace(FRESH, **changes))


def test_devices_that_may_not_be_well_are_named() -> None:
    fleet = {
        "robot-1": seen(),
        "robot-2": seen(online=False, ts=NOW - 7200),
        "robot-3": Seen(1.0),
        "robot-4": seen(fresh_until=NOW - 86_400),
        "robot-5": seen(update_stale=True, fresh_until=0.0),
        "robot-6": seen(clock_suspect=True),
    }
    assert list(troubled(fleet, NOW)) == [
        "silent: robot-2 (last word 2027-01-15 06:00 UTC), robot-3 (never heard)",
        "kept from news, or the repository is not refreshed: "
        "robot-4 (metadata expired 2027-01-14 08:00 UTC), robot-5 (never had any)",
        "its clock is not set, so how old its word is cannot be told: "
        "robot-6 (last word 2027-01-15 07:59 UTC)",
    ]


def test_ten_thousand_silent_devices_fit_on_a_line() -> None:
    (line,) = troubled({f"robot-{n}": Seen(1.0) for n in range(10_000)}, NOW)
    assert line.endswith(f"(never heard) and {10_000 - TROUBLES} more")


class Desk:
    """What a screen asks an operator's connection for."""

    def __init__(self, message: str) -> None:
        self.job = Job("o-1", 1, "robot-1", "FAILED", "[/phase]", evidence={"message": message})
        self.fleet = {"robot-1": seen()}
        self.view = self

    def look(self) -> dict[str, Seen]:
        return self.fleet

    def doubts(self) -> dict[tuple[str, str], int]:
        return {}

    def troubles(self) -> list[tuple[str, Job]]:
        return [("robot-1", self.job)]

    def phases(self) -> Counter[str]:
        return Counter([self.job.phase])


@pytest.mark.parametrize(
    "message", ["[/var/lib] is full", "[/bold]", "[red]no[/red]", "\x1b[2J\x1b]0;title\x07gone"]
)
def test_a_device_s_words_are_shown_and_do_nothing_else(message: str) -> None:
    order = Order("o-1", 1, "g", "tiny", "1.0", "ab" * 32, 0.0, NOW)
    turn = Turn(Record(order, Plan("o-1"), Progress(1, first="robot-1")), Tally(), settled=True)
    desk: Any = Desk(message)
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(Screen(desk, as_json=False)._table(turn))
    shown = capture.get()
    assert "".join(each if each.isprintable() else " " for each in message) in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("state", ["running", "aborted", "rolled-back"])
def test_what_is_over_is_queued_nowhere(state: Any) -> None:
    order = Order("o-1", 1, "g", "tiny", "1.0", "ab" * 32, 0.0, NOW)
    progress = Progress(1, first="robot-1", state=state)
    turn = Turn(Record(order, Plan("o-1"), progress), Tally(waiting=1), settled=True)
    desk: Any = Desk("the repository is out of reach")
    desk.job = replace(desk.job, state="QUEUED", phase="queued")
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(Screen(desk, as_json=False)._table(turn))
    over = state != "running"
    assert ("queued" in capture.get(), "1 not begun" in capture.get()) == (not over, over)
    assert (": 1 waiting" in line(turn), ": 1 not begun" in line(turn)) == (not over, over)
