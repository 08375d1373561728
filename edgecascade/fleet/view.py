# SPDX-License-Identifier: Apache-2.0
"""What an operator has heard of a group's devices: their retained states and reports.

Messages in, a table out; no connection and no clock. A device belongs to the group if it says so,
or if it has reported about the order.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgecascade.fleet.jobs import Job, read_job
from edgecascade.fleet.orders import ID, point
from edgecascade.fleet.rollout import Seen
from edgecascade.service import wire
from edgecascade.service.topics import Address

log = logging.getLogger(__name__)

MAX_STATUS_BYTES = 8 << 10
MAX_DEVICES = 1_000_000
Heard = Callable[[str, int, float], float]  # device, version of its report, now


@dataclass(frozen=True)
class Known:
    """A device as it shows itself; `agent` is the name that the broker proved."""

    agent: str
    bundle: str = ""
    status: str = ""


class View:
    """The devices of one group, and their reports about one order."""

    def __init__(
        self, group: str, order: str, salt: str, heard: Heard = lambda device, version, now: now
    ) -> None:
        self.fleet: dict[str, Seen] = {}
        self.known: dict[str, Known] = {}
        self.changes = 0
        self._group, self._order, self._salt, self._heard = group, order, salt, heard

    def hear(self, address: Address, payload: bytes, now: float) -> None:
        """Take in a message; what is none of ours, or damaged, changes nothing."""
        if address.kind == "status":
            self._status(address.device, _object(payload))
        elif address.kind == "job" and address.order == self._order:
            job = read_job(payload)
            if job is not None and job.order == self._order:
                self._job(address.device, job, now)

    def _status(self, agent: str, body: Mapping[str, Any]) -> None:
        groups, device = body.get("groups"), body.get("device")
        if body.get("kind") != "agent" or not isinstance(groups, list):
            return
        if self._group not in groups or not isinstance(device, str):
            return
        if not self._is_its_own(agent, device):
            return
        word, bundle = body.get("status"), body.get("bundle")
        shown = bundle if isinstance(bundle, str) else ""
        self.known[device] = Known(agent, shown, word if isinstance(word, str) else "")
        self._put(device, replace(self._seen(device), online=word != "offline", bundle=shown))

    def _job(self, agent: str, job: Job, now: float) -> None:
        if not self._is_its_own(agent, job.device):
            return
        self.known.setdefault(job.device, Known(agent))
        seen = self._seen(job.device)
        if seen.job == job:
            return  # the broker says it again
        heard = self._heard(job.device, job.version, now) if seen.job is None else now
        self._put(job.device, replace(seen, job=job, heard=heard))

    def _is_its_own(self, agent: str, device: str) -> bool:
        """Whether this agent may speak for the device: nobody else has before."""
        if not ID.fullmatch(device):
            return False
        if device not in self.known:
            return len(self.known) < MAX_DEVICES
        if self.known[device].agent != agent:
            log.warning("%s speaks for %s, as %s does", agent, device, self.known[device].agent)
            return False
        return True

    def _seen(self, device: str) -> Seen:
        return self.fleet.get(device) or Seen(point(self._salt, device))

    def _put(self, device: str, seen: Seen) -> None:
        if self.fleet.get(device) != seen:
            self.fleet[device] = seen
            self.changes += 1

    def troubles(self) -> list[tuple[str, Job]]:
        """Devices that failed or refused, by name."""
        return sorted(
            (name, seen.job)
            for name, seen in self.fleet.items()
            if seen.job is not None and seen.job.state in ("FAILED", "REJECTED")
        )

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
