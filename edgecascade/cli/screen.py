# SPDX-License-Identifier: Apache-2.0
"""How a rollout and its devices are shown: live on a terminal, as lines, or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecascade.fleet.jobs import Job
    from edgecascade.fleet.operator import Operator, Turn
    from edgecascade.fleet.rollout import Seen, Trouble

NOT_BEGUN = "not begun"
TROUBLES = 5  # devices that are shown with their reason


def facts(turn: Turn) -> dict[str, Any]:
    """How a rollout stands, for programs."""
    record, progress = turn.record, turn.record.progress
    return {
        "order": record.order.order,
        "group": record.order.group,
        "release": f"{record.order.bundle} {record.order.version}",
        "state": progress.state,
        "reason": progress.reason,
        "seq": progress.seq,
        "stage": progress.stage + 1,
        "stages": len(record.plan.stages),
        "percent": record.plan.stages[progress.stage],
        "first": progress.first,
        **asdict(turn.tally),
        "doubts": turn.doubts,
    }


def device(seen: Seen, now: float) -> dict[str, Any]:
    """What is known of a device, for programs."""
    return {
        "online": seen.online,
        "trouble": seen.trouble(now),
        "standing": asdict(seen.standing) if seen.standing else None,
        "job": asdict(seen.job) if seen.job else None,
    }


def troubled(fleet: Mapping[str, Seen], now: float) -> Iterator[str]:
    """Devices of which the operator does not know that all is well, by what it is."""
    found: dict[Trouble, list[str]] = {"silent": [], "stale": [], "undated": []}
    for name, seen in sorted(fleet.items()):
        if trouble := seen.trouble(now):
            found[trouble].append(f"{name} ({_since(seen, trouble)})")
    words = {
        "silent": "silent",
        "stale": "kept from news, or the repository is not refreshed",
        "undated": "its clock is not set, so how old its word is cannot be told",
    }
    for trouble, names in found.items():
        more = f" and {len(names) - TROUBLES} more" if len(names) > TROUBLES else ""
        if names:
            yield f"{words[trouble]}: {', '.join(names[:TROUBLES])}{more}"


def _since(seen: Seen, trouble: Trouble) -> str:
    said = seen.standing
    if said is None:
        return "never heard"
    if trouble == "stale":
        return (
            f"metadata expired {_when(said.fresh_until)}" if said.fresh_until else "never had any"
        )
    return f"last word {_when(said.ts)}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


class Screen:
    """Live on a terminal; else a line for each change, as text or JSON.

    With `whole`, single devices are named while it runs, too.
    """

    def __init__(self, operator: Operator, *, as_json: bool, whole: bool = False) -> None:
        self._whole = whole
        self._operator, self._view, self._json = operator, operator.view, as_json
        self._said: dict[str, Any] = {}
        self._live: Any = None

    def __enter__(self) -> Screen:
        if not self._json and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, turn: Turn) -> None:
        """Show it if it is new."""
        now = facts(turn)
        if now == self._said or not turn.settled:
            return
        self._said = now
        if self._json:
            print(json.dumps({"ts": time.time(), **now}), flush=True)
        elif self._live is not None:
            self._live.update(self._table(turn), refresh=True)
        else:
            print(line(turn), flush=True)
            for text in self._details(turn) if self._whole or turn.record.progress.ended else ():
                print(f"  {text}", flush=True)

    def _details(self, turn: Turn) -> list[str]:
        """What an operator should know of single devices."""
        troubles = self._view.troubles()
        if _is_off(turn):  # what they waited for comes too late
            troubles = [each for each in troubles if each[1].state != "QUEUED"]
        failed = [f"{name} {job.state.lower()}: {_why(job)}" for name, job in troubles[:TROUBLES]]
        now = time.time()
        return [*failed, *self._not_believed(), *troubled(self._operator.look(), now)]

    def _not_believed(self) -> list[str]:
        """Who sent what was not believed, the most first."""
        doubts = sorted(self._operator.doubts().items(), key=lambda each: (-each[1], each[0]))
        return [
            f"not believed: {name}, {reason}, {count} times"
            for (name, reason), count in doubts[:TROUBLES]
        ]

    def _table(self, turn: Turn) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from edgecascade.fleet.rollout import FIRST, stage_s

        plan, progress, count = turn.record.plan, turn.record.progress, turn.tally
        # Text, not str: what a device says may hold brackets, which rich takes for its own.
        table = Table(title=Text(line(turn)), title_justify="left", show_edge=False)
        for name in ("stage", "", "about"):
            table.add_column(name)
        total = max(1, len(self._view.fleet))
        for number, percent in enumerate(plan.stages):
            done = 1.0 if number < progress.stage or progress.state == "done" else 0.0
            if number == progress.stage and count.reachable:
                done = count.succeeded / count.reachable
            size = 1 if percent == FIRST else round(total * percent / 100)
            name = "1 device" if percent == FIRST else f"{percent:g} %"
            bar = ProgressBar(total=1.0, completed=done, width=40)
            table.add_row(name, bar, _duration(stage_s(plan, size)))
        words = {"queued": NOT_BEGUN} if _is_off(turn) else {}
        phases = ", ".join(
            f"{n} {_plain(words.get(name, name))}" for name, n in self._view.phases().most_common()
        )
        return Group(table, Text(phases), *map(Text, self._details(turn)))


def line(turn: Turn) -> str:
    """One line on how it stands."""
    from edgecascade.fleet.rollout import FIRST

    record, progress, count = turn.record, turn.record.progress, turn.tally
    percent = record.plan.stages[progress.stage]
    stage = f"first device {progress.first}" if percent == FIRST else f"{percent:g} %"
    if not progress.first:
        stage = f"waiting for a device of group {record.order.group!r} to be online"
    parts = {
        "succeeded": count.succeeded,
        "on the way": count.active,
        NOT_BEGUN if _is_off(turn) else "waiting": count.waiting,
        "failed": count.failed,
        "lost": count.lost,
        "rejected": count.rejected,
        "unfit": count.unfit,
        "canceled": count.canceled,
        "silent": count.silent,
        "accepted": count.accepted,
    }
    shown = ", ".join(f"{number} {name}" for name, number in parts.items() if number)
    because = f" ({progress.reason})" if progress.reason else ""
    said = f"{stage}: {shown}" if shown else stage
    doubts = f"; {turn.doubts} messages not believed" if turn.doubts else ""
    return f"{record.order.order}: {progress.state}{because}; {said}{doubts}"


def _is_off(turn: Turn) -> bool:
    """Whether a device that has not begun never will."""
    return turn.record.progress.state in ("aborted", "rolled-back")


def _why(job: Job) -> str:
    reason, message = (_plain(job.evidence.get(key) or "") for key in ("reason", "message"))
    return f"{reason}: {message}" if reason and message else message or reason or "no reason given"


def _plain(text: object) -> str:
    """A device's words, without what would move the cursor."""
    return "".join(each if each.isprintable() else " " for each in str(text))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
