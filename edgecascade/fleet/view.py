# SPDX-License-Identifier: Apache-2.0
"""What an operator has heard of a group's devices: how they stand, and their reports.

Messages in, a table out; no connection and no clock. The devices are those that were enrolled,
whether they are heard of or not, and a word counts only if its device signed it, later than all
that counted before, and a report only if it is about this rollout. What does not count is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgecascade.errors import ReportRefused
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.orders import Order, point
from edgecascade.fleet.register import Devices
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.rollout import Seen
from edgecascade.fleet.standing import OFFLINE, SILENT_S
from edgecascade.service import wire
from edgecascade.service.topics import Address

MAX_STATUS_BYTES = 8 << 10
MAX_STRANGERS = 100  # names that are not enrolled; whoever owns the broker may invent more
OTHERS = "others"


@dataclass
class Doubts:
    """Messages that were not believed: how many, by who they came from and why."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _strangers: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts.total()

    def add(self, name: str, reason: str, *, known: bool) -> None:
        """One more."""
        if not known and name not in self._strangers:
            if len(self._strangers) < MAX_STRANGERS:
                self._strangers.add(name)
            else:
                name = OTHERS
        self.counts[name, reason] += 1


class View:
    """The enrolled devices of a group, and their reports about one order.

    `believed` is a record's: what counted before this process began.
    """

    def __init__(
        self, order: Order, devices: Devices, believed: Mapping[str, Any] | None = None
    ) -> None:
        self.fleet: dict[str, Seen] = {}
        self.doubts = Doubts()
        self._order, self._believed = order, believed or {}
        self._keys: dict[str, DeviceKey] = {}
        self._names: dict[str, str] = {}  # of devices, by agent
        self._last: dict[tuple[str, str], bytes] = {}  # digest of what counted last, of each kind
        self._gone: set[str] = set()  # devices whose connection has ended, says the broker
        self.enroll(devices)

    def enroll(self, devices: Devices) -> None:
        """From now on these are the devices. One whose key is another has said nothing yet."""
        known = self._keys
        self._devices, self._ring = devices, devices.keyring(self._order.group)
        self._keys = {key.device: key for key in devices.of(self._order.group)}
        self._names = {key.agent: key.device for key in self._keys.values()}
        fresh = {
            name: Seen(point(self._order.cohort.salt, name), key=key.public)
            for name, key in self._keys.items()
            if name not in known or known[name].public != key.public
        }
        kept = {name: seen for name, seen in self.fleet.items() if name in self._keys}
        self._last = {each: said for each, said in self._last.items() if each[0] not in fresh}
        self.fleet = {**kept, **fresh}

    @property
    def devices(self) -> Devices:
        """Who is enrolled, in all groups."""
        return self._devices

    def hear(self, address: Address, payload: bytes, now: float) -> None:
        """Take in a message; what is none of ours, or not believed, changes no device."""
        if address.kind == "status":
            self._presence(address.device, _object(payload))
        elif payload and (address.kind == "standing" or address.order == self._order.order):
            self._word(address, payload, now)

    def at(self, now: float) -> dict[str, Seen]:
        """The devices as they are known at this time: who has not said a word lately has gone."""
        for name, seen in self.fleet.items():
            said = seen.standing is not None and seen.standing.present(now)
            online = said and name not in self._gone
            # A clock that was set back must not make a silence longer than it is.
            if online != seen.online or seen.heard > now:
                self.fleet[name] = replace(seen, online=online, heard=min(seen.heard, now))
        return dict(self.fleet)

    def _word(self, address: Address, payload: bytes, now: float) -> None:
        name, kind = self._names.get(address.device), address.kind
        if name is None and kind == "standing":
            return  # of other groups, or of somebody else's fleet
        digest = hashlib.sha256(payload).digest()
        if name is not None and self._last.get((name, kind)) == digest:
            return  # the broker says it again
        try:
            who = self._stand(payload, now) if kind == "standing" else self._report(payload, now)
            self._last[who, kind] = digest
        except ReportRefused as error:
            self.doubts.add(name or address.device, error.reason, known=name is not None)

    def _presence(self, agent: str, body: Mapping[str, Any]) -> None:
        """Whether a connection has ended: the broker says so, and nobody could sign it."""
        groups, name = body.get("groups"), self._names.get(agent)
        if body.get("kind") != "agent" or not isinstance(groups, list):
            return
        if name is None or body.get("device") != name:
            if self._order.group in groups:
                self.doubts.add(name or agent, "not-enrolled", known=name is not None)
        elif body.get("status") == OFFLINE:
            self._gone.add(name)
        else:
            self._gone.discard(name)

    def _stand(self, payload: bytes, now: float) -> str:
        """Take in how a device stands, unless it is an old word or one of the future."""
        standing = self._ring.standing(payload)
        seen = self.fleet[standing.device]
        before = seen.standing
        if before is not None and standing != before and standing.turn <= before.turn:
            raise ReportRefused(f"{standing.device} has spoken since", reason="replayed")
        if standing.ts - now >= SILENT_S:
            raise ReportRefused(
                f"{standing.device} says it will be {standing.ts:.0f}", reason="future"
            )
        self.fleet[standing.device] = replace(seen, standing=standing)
        return standing.device

    def _report(self, payload: bytes, now: float) -> str:
        job = self._proven(payload)
        self._count(job, now)
        return job.device

    def _proven(self, payload: bytes) -> Job:
        """The report, if it is an enrolled device's own, and about this rollout."""
        job, order = self._ring.verify(payload), self._order
        here = (job.order, job.group) == (order.order, order.group)
        if not here or job.seq < order.seq:  # a name that was used before has lower numbers
            raise ReportRefused(
                f"{job.device} speaks of order {job.order!r}, seq {job.seq}", reason="other-order"
            )
        # A device that cannot believe an order says so, and does not know what it would install.
        refused = job.state == "REJECTED" and not job.release
        if job.release != order.release_sha256 and not refused:
            raise ReportRefused(
                f"{job.device} speaks of release {job.release!r}", reason="other-release"
            )
        return job

    def _count(self, job: Job, now: float) -> None:
        """Take a proven report in, unless it is an old one."""
        seen = self.fleet[job.device]
        before, when = self._newest(job.device)
        if job.version < before or (job.version == before and seen.job not in (None, job)):
            raise ReportRefused(
                f"{job.device} said version {job.version}, and {before} before", reason="replayed"
            )
        heard = when if job.version == before else now
        self.fleet[job.device] = replace(seen, job=job, heard=heard)

    def _newest(self, name: str) -> tuple[int, float]:
        """Version and time of the latest report that counted, by this process or an earlier one."""
        seen = self.fleet[name]
        if seen.job is not None:
            return seen.job.version, seen.heard
        version, when, key = self._believed.get(name, (-1, 0.0, seen.key))
        # A stolen key may have signed the highest number there is.
        return (int(version), float(when)) if key == seen.key else (-1, 0.0)

    def troubles(self) -> list[tuple[str, Job]]:
        """Devices that failed or refused, by name, then those that say what they wait for."""
        said = [(name, seen.job) for name, seen in sorted(self.fleet.items()) if seen.job]
        ended = [(name, job) for name, job in said if job.state in ("FAILED", "REJECTED")]
        return ended + [each for each in said if each[1].state == "QUEUED" and each[1].evidence]

    def phases(self) -> Counter[str]:
        """How many devices are in which phase."""
        jobs = [seen.job for seen in self.fleet.values() if seen.job is not None]
        return Counter(job.state.lower() if job.ended else job.phase or "queued" for job in jobs)


def _object(payload: bytes) -> dict[str, Any]:
    if len(payload) > MAX_STATUS_BYTES:
        return {}
    try:
        body = wire.decode(payload)
    except wire.BadJson:
        return {}
    return body if isinstance(body, dict) else {}
