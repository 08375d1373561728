# SPDX-License-Identifier: Apache-2.0
"""An agent's line and an operator's at one broker, and whether they still understand each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from edgecascade.fleet import reports
from edgecascade.fleet.faults.wire import until
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.line import Line
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.settings import AgentSettings
from edgecascade.fleet.standing import Standing
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing
from edgecascade.service.topics import Topics

GROUP = "site"
TOPICS = Topics()
BOUND_S = 60.0  # until all is as it should be again


class Spoke:
    """An agent without a device: it reports what it hears."""

    def __init__(self, url: str, name: str) -> None:
        with fleet_extra():
            from securesystemslib.signer import CryptoSigner
        self.settings = AgentSettings(root="unused", device_id=name, mqtt=url, groups=(GROUP,))
        self._signer = CryptoSigner.generate_ed25519()
        self.heard: list[bytes] = []
        self.told: Job | None = None
        self._lock = threading.Lock()
        self.line = self._begin()

    def _begin(self) -> Line:
        line = Line(self.settings, self._standing, self.hear, self._signer)
        if self.told is not None:
            line.tell(self.told)  # a new process reports what its state file says
        line.start()
        return line

    def restart(self) -> None:
        """A new process, as after an error that ended the old one."""
        self.line.close()
        self.line = self._begin()

    def close(self) -> None:
        """End it."""
        self.line.close()

    def _standing(self, *, leaving: bool = False) -> Standing:
        return Standing(self.settings.device_id, 1, "offline" if leaving else "online")

    def hear(self, data: bytes) -> None:
        """An order came: report that."""
        with self._lock:
            self.heard.append(data)
            before = self.told.version if self.told else 0
            job = Job("order", len(self.heard), self.settings.device_id, "IN_PROGRESS")
            self.told = replace(job, version=before + 1, evidence={"heard": data.decode()})
        self.line.tell(self.told)


class Operator:
    """Keeps one order retained, also at a broker that forgets, and sees what is reported."""

    def __init__(self, url: str) -> None:
        self.order = b"order-0"
        self.jobs: dict[str, Job] = {}
        filters = (TOPICS.job("+", "+"),)
        options = LinkOptions(broker_address(url), "operator", filters, forget=True)
        self.link = Link(options, self._hear, births=lambda: [self._announcement()])
        self.link.start()

    def _announcement(self) -> Outgoing:
        return Outgoing(TOPICS.announce(GROUP), self.order, retain=True)

    def announce(self, order: bytes) -> None:
        """From now on this is the order."""
        self.order = order
        self.link.publish(self._announcement())

    def _hear(self, message: Incoming) -> None:
        job = reports.unproven(message.payload)
        if job is not None:
            self.jobs[job.device] = job


class Hub:
    """A broker with an operator and some spokes."""

    def __init__(self, broker: LocalBroker, url: str, count: int, stack: ExitStack) -> None:
        self.broker, self.url = broker, url
        self.operator = Operator(broker.url)
        stack.callback(self.operator.link.stop)
        self.spokes = [Spoke(url, f"device-{i}") for i in range(count)]
        for spoke in self.spokes:
            stack.callback(spoke.close)
        self._number = 0

    def agree(self) -> str:
        """Give a new order; what is wrong if not every device obeys and is heard to."""
        self._number += 1
        order = f"order-{self._number}".encode()
        self.operator.announce(order)

        def all_said() -> bool:
            for spoke in self.spokes:
                job = self.operator.jobs.get(spoke.settings.device_id)
                if job is None or job.evidence.get("heard") != order.decode():
                    return False
            return True

        if until(all_said, BOUND_S):
            return ""
        seen = {name: dict(job.evidence) for name, job in self.operator.jobs.items()}
        up = [spoke.line.up for spoke in self.spokes]
        return f"{order.decode()} is not obeyed everywhere: {seen}, connected {up}"

    def retained(self) -> str:
        """What is wrong with what a newcomer reads at the broker."""
        with newcomer(self.broker.url) as jobs:

            def told() -> dict[str, Job | None]:
                # An order that comes once more is reported once more, also while this waits.
                return {spoke.settings.device_id: spoke.told for spoke in self.spokes}

            def same() -> bool:
                return all(jobs.get(name) == job for name, job in told().items())

            return "" if until(same, BOUND_S) else f"retained is {jobs}, reported was {told()}"


@contextmanager
def newcomer(url: str) -> Iterator[dict[str, Job]]:
    """Somebody who knows nothing: the retained reports, as they come."""
    jobs: dict[str, Job] = {}

    def hear(message: Incoming) -> None:
        job = reports.unproven(message.payload)
        if job is not None:
            jobs[job.device] = job

    options = LinkOptions(broker_address(url), "newcomer", (TOPICS.job("+", "+"),), forget=True)
    link = Link(options, hear)
    link.start()
    try:
        yield jobs
    finally:
        with contextlib.suppress(OSError):
            link.stop()


def hear_of(check: Callable[[], str], *more: Callable[[], str]) -> str:
    """The first thing that is wrong."""
    return next((said for each in (check, *more) if (said := each())), "")
