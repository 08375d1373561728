# SPDX-License-Identifier: Apache-2.0
"""A rollout on the operator's disk: what was asked for, where it stands, and the order to retain.

One small file for each rollout. It is replaced before anything is published, so a controller that
is killed in between publishes the same order when it comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecascade.errors import FleetError, InvalidRequest
from edgecascade.files import canonical_json, replace_file
from edgecascade.fleet import strict
from edgecascade.fleet.locked import locked
from edgecascade.fleet.orders import ID, Action, Cohort, Order
from edgecascade.fleet.rollout import FIRST, Fleet, Plan, Progress, State

SCHEMA = 1
MAX_BYTES = 16 << 20
ACTIONS: dict[State, Action] = {
    "running": "install",
    "done": "install",  # devices that come late still get it
    "paused": "pause",
    "aborted": "abort",
    "rolled-back": "rollback",
}


@dataclass(frozen=True)
class Record:
    """Everything about a rollout that outlives the controller.

    `order` has what does not change: release, group, window, mirrors, and the number that the
    rollout began with. `believed` has, of each device, the version of its latest report that
    counted, when that came, and its key: [version, time, key]. An older one does not count any
    more.
    """

    order: Order
    plan: Plan
    progress: Progress
    believed: dict[str, Any] = field(default_factory=dict)

    @property
    def begun(self) -> float:
        """When the rollout was asked for, by the operator's clock."""
        return self.order.expires - self.plan.valid_s

    def to_order(self) -> Order:
        """The order that is to be retained now: a function of this record alone."""
        plan, progress = self.plan, self.progress
        action = ACTIONS[progress.state]
        one = action == "install" and plan.stages[progress.stage] == FIRST
        whole = one or action != "install"
        percent = 100.0 if whole else plan.stages[progress.stage]
        rates = [rate for rate in (progress.kbit_s, self.order.limits.kbit_s) if rate]
        return replace(
            self.order,
            seq=progress.seq,
            action=action,
            device=progress.first if one else None,
            cohort=Cohort(self.order.cohort.salt, percent),
            limits=replace(self.order.limits, kbit_s=min(rates) if rates else None),
            expires=max(progress.signed_at, self.order.not_before) + plan.valid_s,
        )

    def moved(self, progress: Progress, fleet: Fleet) -> Record:
        """The record with another progress, and with what has been believed by now."""
        now = {
            name: [seen.job.version, seen.heard, seen.key]
            for name, seen in fleet.items()
            if seen.job
        }
        return replace(self, progress=progress, believed={**self.believed, **now})


class Records:
    """The folder of them. Who changes one holds the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from changing a record.

        Raises:
            FleetError: when another one holds it for long.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.folder / "lock", self.folder):
            yield

    def write(self, record: Record) -> None:
        """Replace a record; it is on the disk when this returns."""
        data = canonical_json({"schema": SCHEMA, **asdict(record)})
        replace_file(self._path(record.order.order), data)

    def read(self, order: str) -> Record:
        """The record of an order.

        Raises:
            InvalidRequest: when there is none.
            FleetError: when it is damaged.
        """
        if not ID.fullmatch(order):
            raise InvalidRequest(f"order is {order!r}; give {ID.pattern}")
        try:
            data = self._path(order).read_bytes()
        except FileNotFoundError:
            known = ", ".join(sorted(self._names())) or "none"
            raise InvalidRequest(f"no rollout {order!r} in {self.folder}; known: {known}") from None
        return _parse(data, str(self._path(order)))

    def all(self) -> list[Record]:
        """All records, those of a group from its oldest to its newest."""
        return sorted(map(self.read, self._names()), key=lambda record: record.progress.seq)

    def latest(self, group: str | None = None) -> Record:
        """The newest rollout of a group, or of all: the one that was begun last.

        Raises:
            InvalidRequest: when there is none.
        """
        # Numbers count within a group only: those of another may be ahead.
        newest = {record.order.group: record for record in self.all()}
        mine = [record for name, record in newest.items() if group in (None, name)]
        if not mine:
            raise InvalidRequest(f"no rollout in {self.folder}; start one with fleet rollout")
        return max(mine, key=lambda record: record.begun)

    def check_newest(self, record: Record) -> None:
        """Only the newest order of a group is obeyed by its devices.

        Raises:
            InvalidRequest: when there is a newer one.
        """
        newest = self.latest(record.order.group)
        if newest.order.order != record.order.order:
            raise InvalidRequest(
                f"{newest.order.order} came after {record.order.order}; "
                "devices obey the newest order of their group only"
            )

    def next_seq(self, group: str, first: int, now: float) -> int:
        """A number above all before it. It holds the time, so that lost records repeat none."""
        known = [record.progress.seq for record in self.all() if record.order.group == group]
        return max(first + int(now), *(seq + 1 for seq in known), 1)

    def _path(self, order: str) -> Path:
        return self.folder / f"{order}.json"

    def _names(self) -> list[str]:
        return [path.stem for path in self.folder.glob("*.json")]


def _parse(data: bytes, where: str) -> Record:
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has {len(data)} bytes")
        raw = json.loads(data)
        if raw.pop("schema") != SCHEMA:
            raise ValueError("it was written by another version")
        return strict.read(Record, raw, "rollout")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise FleetError(
            f"{where} is damaged: {error}; restore it from a copy, or move it away: the rollout is "
            "forgotten then, and a new one can begin",
            reason="record",
        ) from None
