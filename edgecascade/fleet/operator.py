# SPDX-License-Identifier: Apache-2.0
"""The operator's connection, and the loop around the controller.

Each turn reads the record, asks `rollout.step`, and if the answer differs: record on the disk, line
in the audit log, order at the broker, in this order. Nothing is decided before everything that the
broker retains has been heard: a message to ourselves, sent after the subscriptions, comes last.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecascade.errors import FleetError, NetworkError
from edgecascade.fleet import audit, rollout
from edgecascade.fleet.orders import Order
from edgecascade.fleet.record import Record, Records
from edgecascade.fleet.register import Devices
from edgecascade.fleet.rollout import Progress, Tally
from edgecascade.fleet.view import View
from edgecascade.service.config import BrokerAddress
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing
from edgecascade.service.topics import Topics

log = logging.getLogger(__name__)

CONNECT_S = 15.0
SETTLE_S = 60.0  # for all that is retained to arrive
QUIET_S = 0.3  # a broker may send retained messages beside the others
TURN_S = 0.2  # between two decisions when much is heard
REST_S = 2.0  # and when nothing is
REFRESH_S = 60.0  # a broker drops messages for a client that is slow: ask for all again
COME_BACK_S = 3.0  # after another command took our name at the broker
ANSWER_S = 30.0  # for an order to be acknowledged
RECEIVE_MAXIMUM = 1000

BELIEVED_S = 5.0  # how old what is written about believed reports may be


@dataclass(frozen=True)
class Signing:
    """What the operator's keys do: sign an order, read another's, and where numbers begin."""

    sign: Callable[[Order], bytes]
    verified: Callable[[bytes], Order | None]
    first_seq: Callable[[], int]


@dataclass(frozen=True)
class Turn:
    """How the rollout stands. Not `settled`: more is still to be heard, or the order to be sent.

    `doubts` is how many messages were not believed.
    """

    record: Record
    tally: Tally
    settled: bool
    doubts: int = 0


class Operator:
    """A connection that hears a group's devices and announces orders.

    with Operator(address, "operator", topics, view, group=..., order=...) as operator:
        operator.settle()
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        topics: Topics,
        view: View,
        *,
        group: str,
        order: str,
    ) -> None:
        self.view = view
        self.retained: bytes | None = None  # the group's order at the broker
        self._topics, self._name, self._group = topics, name, group
        self._heard = threading.Event()
        self._asked = self._answered = 0  # messages to ourselves
        self._answered_at = 0.0
        self._lock = threading.Lock()  # of the view
        self._denied = ""
        self._acknowledged = threading.Event()
        filters = (
            topics.status("+"),
            topics.standing("+"),
            topics.job("+", order),
            topics.announce(group),
            topics.command(name, "fence"),
        )
        self._options = LinkOptions(
            address,
            name,
            filters,
            receive_maximum=RECEIVE_MAXIMUM,
            session_expiry_s=0,
            forget=True,
        )
        self._away_since: float | None = None  # while another command has our name
        self._link = self._new_link()

    def __enter__(self) -> Operator:
        self._link.connect(CONNECT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._link.stop()

    def keep(self) -> None:
        """Come back when another command has had our name at the broker, and is done.

        A certificate has one name, so `fleet status` in another terminal takes the connection from
        `fleet rollout`. Nothing is lost: all that matters is retained.
        """
        if self._link.fatal is None:
            self._away_since = None
            return
        if self._away_since is None:
            log.warning("%s; back soon", self._link.fatal)
            self._away_since = time.monotonic()
        elif time.monotonic() - self._away_since > COME_BACK_S * random.uniform(1.0, 2.0):
            self._link.stop()
            self._away_since = None
            self._link = self._new_link()
            self._link.start()

    def settle(self, timeout_s: float = SETTLE_S) -> None:
        """Wait until everything that the broker retains has been heard.

        Raises:
            NetworkError: when it does not send it all.
        """
        end = time.monotonic() + timeout_s
        while not self.settled:
            self.keep()
            if time.monotonic() > end:
                raise NetworkError(
                    f"the broker does not send all retained messages within {timeout_s:g} s "
                    f"({self._link.counters.received} came); may {self._name!r} read "
                    f"{self._topics.prefix}/#, and is max_queued_messages above the number of "
                    "devices?"
                )
            time.sleep(0.02)

    @property
    def settled(self) -> bool:
        """Whether all that was retained at the last subscription has come."""
        calm = time.monotonic() - self._answered_at >= QUIET_S
        return self._link.up and 0 < self._asked == self._answered and calm

    @property
    def reason(self) -> str:
        """Why the connection is as it is."""
        return self._link.fatal or self._link.reason

    def refresh(self) -> None:
        """Hear all retained messages again."""
        self._link.refresh()

    def wait(self, timeout_s: float) -> None:
        """Until something is heard."""
        self._heard.wait(timeout_s)
        self._heard.clear()

    def announce(self, envelope: bytes) -> bool:
        """Retain an order for the group; whether the broker has acknowledged it.

        Raises:
            NetworkError: when the broker refuses it.
        """
        self._acknowledged.clear()
        self._denied = ""
        message = Outgoing(self._topics.announce(self._group), envelope, retain=True)
        taken = self._link.publish(message) and self._acknowledged.wait(ANSWER_S)
        if self._denied:
            raise NetworkError(self._denied)
        if taken:
            self.retained = envelope
        return taken

    def look(self) -> dict[str, rollout.Seen]:
        """The devices as they are known now."""
        with self._lock:
            return self.view.at(time.time())

    def doubts(self) -> dict[tuple[str, str], int]:
        """How many messages were not believed, by who they came from and why."""
        with self._lock:
            return dict(self.view.doubts.counts)

    def enroll(self, devices: Devices) -> None:
        """Go by these devices; what the broker retains of new ones is heard again."""
        with self._lock:
            if devices == self.view.devices:
                return
            self.view.enroll(devices)
        self.refresh()

    def _new_link(self) -> Link:
        return Link(self._options, self._on_message, births=self._fence, on_result=self._on_result)

    # The link's thread calls these.

    def _fence(self) -> list[Outgoing]:
        self._asked += 1
        self.retained = None  # if there is one it comes now
        topic = self._topics.command(self._name, "fence")
        return [Outgoing(topic, str(self._asked).encode())]

    def _on_message(self, message: Incoming) -> None:
        address = self._topics.parse(message.topic)
        if address is None:
            return
        if address.kind == "command":
            self._came_back(message.payload)
        elif address.kind == "announce":
            self.retained = message.payload or None
        else:
            with self._lock:
                self.view.hear(address, message.payload, time.time())
        self._heard.set()

    def _came_back(self, payload: bytes) -> None:
        if payload == str(self._asked).encode():
            self._answered = self._asked
            self._answered_at = time.monotonic()

    def _on_result(self, message: Outgoing, reason: int) -> None:
        if message.topic == self._topics.announce(self._group):
            if reason >= 0x80:
                self._denied = (
                    f"the broker refuses orders of {self._name!r} (0x{reason:02x}); "
                    "name it as an operator in the access list"
                )
            self._acknowledged.set()


class Controller:
    """One rollout's loop. It may be killed anywhere and started again."""

    def __init__(
        self,
        operator: Operator,
        records: Records,
        order: str,
        signing: Signing,
        log: Path,
        devices: Callable[[], Devices],
    ) -> None:
        self._operator, self._records, self._order = operator, records, order
        self._signing, self._log, self._devices = signing, log, devices
        self._doubted: set[str] = set()
        self._signed: tuple[Order | None, bytes] = None, b""
        self._noted: Order | None = None
        self._written_at = self._refreshed_at = time.monotonic()

    def run(self, show: Callable[[Turn], None] = lambda turn: None) -> Turn:
        """Decide until the rollout has ended, is paused or rolled back.

        Raises:
            FleetError: when somebody else signs orders for the group.
        """
        while True:
            turn = self.turn()
            show(turn)
            if turn.settled and turn.record.progress.ended:
                return turn
            if time.monotonic() - self._refreshed_at > REFRESH_S:
                self._refreshed_at = time.monotonic()
                self._operator.refresh()
            self._operator.wait(REST_S)
            time.sleep(TURN_S)

    def turn(self) -> Turn:
        """Look, decide, write down, announce."""
        self._operator.keep()
        self._operator.enroll(self._devices())  # somebody may have been enrolled or revoked
        with self._records.locked():
            record = self._records.read(self._order)
            fleet, now = self._operator.look(), time.time()
            settled = self._operator.settled
            if settled:
                after = rollout.step(record.plan, record.progress, fleet, now)
                after = rollout.at_least(after, self._signing.first_seq(), now)
                record = self._keep(record, after, fleet)
        said = settled and self._announce(record)
        if settled and not said:
            log.warning("the order is not acknowledged (%s); once more", self._operator.reason)
        return self._turn(record, fleet, now, settled=said)

    def act(self, change: Callable[[Record, rollout.Fleet, float], Progress]) -> Turn:
        """Change the rollout at an operator's word.

        Raises:
            InvalidRequest: when it cannot be changed so.
        """
        self._operator.enroll(self._devices())
        self._operator.settle()
        with self._records.locked():
            record = self._records.read(self._order)
            self._records.check_newest(record)
            fleet, now = self._operator.look(), time.time()
            after = rollout.at_least(change(record, fleet, now), self._signing.first_seq(), now)
            record = record.moved(after, fleet)
            self._records.write(record)
        if not self._announce(record):
            raise NetworkError(
                f"the broker has not acknowledged the order ({self._operator.reason}); it is "
                "written down: fleet rollout or any of these commands sends it"
            )
        return self._turn(record, fleet, now, settled=True)

    def _turn(self, record: Record, fleet: rollout.Fleet, now: float, *, settled: bool) -> Turn:
        doubts = self._operator.doubts()
        for (name, reason), times in doubts.items():
            if reason not in self._doubted:  # once: whoever forges reports must not fill this disk
                self._doubted.add(reason)
                facts = {"order": self._order, "from": name, "reason": reason, "count": times}
                audit.append(self._log, "not-believed", now, facts)
        count = rollout.tally(record.plan, record.progress, fleet, now)
        return Turn(record, count, settled, sum(doubts.values()))

    def _keep(self, record: Record, after: Progress, fleet: rollout.Fleet) -> Record:
        moved = record.moved(after, fleet)
        late = time.monotonic() - self._written_at > BELIEVED_S
        if after != record.progress or (late and moved.believed != record.believed):
            self._records.write(moved)
            self._written_at = time.monotonic()
        return moved

    def _announce(self, record: Record) -> bool:
        """Have the broker retain this record's order, unless it does; whether it does now."""
        if not record.progress.first and record.progress.state == "running":
            return True
        order = record.to_order()
        if order != self._signed[0]:
            self._signed = order, self._signing.sign(order)
        envelope = self._signed[1]
        heard = self._operator.retained
        if heard == envelope:
            return True
        rival = self._signing.verified(heard) if heard is not None else None
        if rival is not None and rival.seq > order.seq:
            raise FleetError(
                f"order {rival.order!r} with seq {rival.seq} ({rival.action}) was announced to "
                f"group {rival.group!r} after {order.order!r}, seq {order.seq}; this rollout ends "
                "here",
                reason="overtaken",
            )
        if order != self._noted:
            audit.append(self._log, "announce", time.time(), _facts(record, order, envelope))
            self._noted = order
        return self._operator.announce(envelope)


def order_trouble(record: Record, retained: bytes | None, signing: Signing) -> str:
    """Why devices may not obey what a rollout has come to: the broker does not show its order."""
    if not record.progress.first and record.progress.state == "running":
        return ""
    order = record.to_order()
    if retained is None:
        return f"the broker retains no order for group {order.group!r}"
    shown = signing.verified(retained)
    if shown is None:
        return f"what the broker retains for group {order.group!r} is no order that is in force"
    named = f"order {shown.order!r}, seq {shown.seq} ({shown.action})"
    if shown.seq > order.seq:
        return f"overtaken: {named} was announced to group {order.group!r} later"
    if shown.seq < order.seq:
        return f"the broker shows an older order: {named}; the latest is seq {order.seq}"
    return ""


def _facts(record: Record, order: Order, envelope: bytes) -> dict[str, Any]:
    progress = record.progress
    return {
        "order": order.order,
        "seq": order.seq,
        "group": order.group,
        "release": f"{order.bundle} {order.version}",
        "release_sha256": order.release_sha256,
        "action": order.action,
        "device": order.device,
        "percent": order.cohort.percent,
        "state": progress.state,
        "reason": progress.reason,
        "accepted": len(progress.accepted),
        "envelope_sha256": hashlib.sha256(envelope).hexdigest(),
        "user": getpass.getuser(),
    }
