# SPDX-License-Identifier: Apache-2.0
"""Devices that only talk: thousands of them in one process, each with its own connection.

They speak MQTT 5 themselves, a few bytes of it, since a client library would take megabytes for
each. An order is verified, its cohort computed and every report signed as on a device; what it asks
for takes a moment and ends as the fleet's dice say. Used to try rollouts against a real broker.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from edgecascade.errors import UpdateRefused
from edgecascade.fleet import reports
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.orders import Order, OrderKeys, verify
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.standing import HEARTBEAT_S, Standing
from edgecascade.fleet.state import Phase
from edgecascade.service import wire
from edgecascade.service.topics import DEFAULT_PREFIX, Topics

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

KEEPALIVE_S = 600
FRESH_S = 86_400.0  # what a device's metadata are good for
AT_ONCE = 200  # connections that are being made
WAY = (
    Phase.DOWNLOADING,
    Phase.VERIFYING,
    Phase.STAGING,
    Phase.DRAINING,
    Phase.PROBATION,
)
CONNACK, PUBLISH, PUBACK, SUBACK = 0x20, 0x30, 0x40, 0x90


@dataclass(frozen=True)
class Behaviour:
    """What devices do: shares that fail or fall silent on trial, and how long a phase takes.

    The first `spared` devices never fail: a fault that only a larger stage shows.
    """

    fails: float = 0.0
    spared: int = 0
    vanishes: float = 0.0
    phase_s: float = 0.2
    seed: int = 1


@dataclass
class VirtualFleet:
    """Devices of one group on one broker. All methods run on one event loop."""

    port: int
    keys: OrderKeys
    group: str = "fleet"
    behaviour: Behaviour = field(default_factory=Behaviour)
    prefix: str = DEFAULT_PREFIX
    now: float = 0.0  # orders are judged by this time
    exposed: int = 0  # devices that switched to the new bundle, whatever came of it
    counts: Counter[str] = field(default_factory=Counter)
    devices: list[Device] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.topics = Topics(self.prefix)
        self.random = Random(self.behaviour.seed)
        self._verified: dict[bytes, Order | None] = {}

    def keys_of(self, count: int) -> list[DeviceKey]:
        """What so many devices would be enrolled with: the same each time."""
        return [
            DeviceKey(name, agent_of(name), public_hex(signer_of(name).public_key), (self.group,))
            for name in map(name_of, range(count))
        ]

    async def connect(self, count: int) -> None:
        """Connect so many devices, say that they are there, and listen to orders."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> Device:
            async with gate:
                return await Device(self, name_of(number)).open()

        self.devices += await asyncio.gather(*(one(number) for number in range(count)))

    def close(self) -> None:
        """Cut all connections, as a power cut does."""
        for device in self.devices:
            device.cut()

    def order_in(self, envelope: bytes) -> Order | None:
        """The order, verified once for all devices."""
        if envelope not in self._verified:
            try:
                self._verified[envelope] = verify(envelope, self.keys, self.now)
            except UpdateRefused:
                self._verified[envelope] = None
                self.counts["refused"] += 1
        return self._verified[envelope]


class Device(asyncio.Protocol):
    """One connection; the agent's side of an update without the update."""

    def __init__(self, fleet: VirtualFleet, name: str) -> None:
        self.fleet, self.name = fleet, name
        self.agent = agent_of(name)
        self._signer = signer_of(name)
        self.seq = 0
        self.job: Job | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heart: asyncio.TimerHandle | None = None
        self._number = self._acknowledged = 0

    async def open(self) -> Device:
        """Connect, subscribe, publish the retained status."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", self.fleet.port)
        await self._ready
        return self

    def cut(self) -> None:
        """Lose power."""
        for timer in (self._timer, self._heart):
            if timer is not None:
                timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send CONNECT with the last will."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        topic = self.fleet.topics.status(self.agent).encode()
        body = (
            _text(b"MQTT")
            + bytes((5, 0x02 | 0x04 | 0x08 | 0x20))  # clean start, will at QoS 1, retained
            + struct.pack("!H", KEEPALIVE_S)
            + b"\0"
            + _text(self.agent.encode())
            + b"\0"
            + _text(topic)
            + _text(self._status("offline"))
        )
        self._send(0x10, body)

    def connection_lost(self, error: Exception | None) -> None:
        """Count it; nobody comes back."""
        self.fleet.counts["lost connections"] += 1
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(f"{self.name} was disconnected: {error}"))

    def data_received(self, data: bytes) -> None:
        """Take whole packets out of what has arrived."""
        self._buffer += data
        while (packet := _take(self._buffer)) is not None:
            kind, body = packet
            if kind == CONNACK:
                self._connected(body)
            elif kind == SUBACK:
                self._publish(self.fleet.topics.status(self.agent), self._status("online"))
                self._stand()
            elif kind == PUBACK:
                self._acknowledged += 1
                if self._acknowledged == 2:  # presence and standing
                    self._ready.set_result(None)
            elif kind & 0xF0 == PUBLISH:
                self._message(kind, body)

    def _connected(self, body: bytes) -> None:
        if body[1]:
            self._ready.set_exception(ConnectionError(f"{self.name} is refused: 0x{body[1]:02x}"))
            return
        topic = self.fleet.topics.announce(self.fleet.group).encode()
        self._send(0x82, struct.pack("!H", 1) + b"\0" + _text(topic) + b"\x01")

    def _message(self, kind: int, body: bytes) -> None:
        (size,) = struct.unpack_from("!H", body)
        at = 2 + size
        if kind & 0x06:
            self._send(PUBACK, body[at : at + 2])
            at += 2
        at += 1 + body[at]  # properties: none, or a few short ones
        self.fleet.counts["orders"] += 1
        order = self.fleet.order_in(bytes(body[at:]))
        if order is not None and order.seq > self.seq:
            self.seq = order.seq
            self._obey(order)

    def _obey(self, order: Order) -> None:
        fleet, job = self.fleet, self.job
        if not order.concerns(self.name, (fleet.group,)):
            return
        if job is None or job.order != order.order:
            if order.action == "install":
                self.job = Job(
                    order.order,
                    order.seq,
                    self.name,
                    "QUEUED",
                    bundle_to=order.version,
                    group=order.group,
                    release=order.release_sha256,
                )
                self._report(self.job)
                self._later(0)
            return
        going = not job.ended
        if order.action == "install" and job.phase == "paused":
            self._later(0)
        elif order.action == "pause" and going and job.phase != Phase.PROBATION.value:
            self._stop(job, "IN_PROGRESS", "paused")
        elif (order.action == "abort" and going) or (
            order.action == "rollback" and (going or job.state == "SUCCEEDED")
        ):
            self._stop(job, "CANCELED", "")

    def _stop(self, job: Job, state: str, phase: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._report(replace(job, state=state, phase=phase))  # type: ignore[arg-type]

    def _later(self, step: int) -> None:
        delay = self.fleet.behaviour.phase_s * self.fleet.random.uniform(0.5, 1.5)
        self._timer = asyncio.get_running_loop().call_later(delay, self._advance, step)

    def _advance(self, step: int) -> None:
        fleet, job = self.fleet, self.job
        assert job is not None
        if step < len(WAY):
            fleet.exposed += WAY[step] is Phase.PROBATION
            self._report(replace(job, state="IN_PROGRESS", phase=WAY[step].value))
            if WAY[step] is Phase.PROBATION and fleet.random.random() < fleet.behaviour.vanishes:
                self.cut()
            else:
                self._later(step + 1)
        elif (
            fleet.random.random() < fleet.behaviour.fails and fleet.exposed > fleet.behaviour.spared
        ):
            self._report(replace(job, state="FAILED", phase="", evidence={"reason": "dice"}))
        else:
            self._report(replace(job, state="SUCCEEDED", phase="", progress=1.0))

    def _report(self, job: Job) -> None:
        self.job = replace(job, version=job.version + 1)
        self.fleet.counts["reports"] += 1
        signed = reports.sign(self.job, self._signer)
        self._publish(self.fleet.topics.job(self.agent, job.order), signed)

    def _stand(self) -> None:
        self._number += 1
        now = time.time()
        word = Standing(self.name, 1, number=self._number, ts=now, fresh_until=now + FRESH_S)
        topic = self.fleet.topics.standing(self.agent)
        self._publish(topic, reports.sign(word, self._signer))
        self._heart = asyncio.get_running_loop().call_later(
            HEARTBEAT_S * self.fleet.random.uniform(0.8, 1.0), self._stand
        )

    def _status(self, word: str) -> bytes:
        groups = [self.fleet.group]
        return wire.encode({"kind": "agent", "status": word, "device": self.name, "groups": groups})

    def _publish(self, topic: str, payload: bytes) -> None:
        body = _text(topic.encode()) + struct.pack("!H", 1) + b"\0" + payload
        self._send(PUBLISH | 0x02 | 0x01, body)  # QoS 1, retained

    def _send(self, kind: int, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(bytes((kind,)) + _length(len(body)) + body)


def name_of(number: int) -> str:
    """A device's name."""
    return f"v{number:05d}"


def agent_of(name: str) -> str:
    """Its agent's."""
    return f"{name}-agent"


def signer_of(name: str) -> CryptoSigner:
    """Its key, which follows from the name: nobody has to keep thousands."""
    with fleet_extra():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from securesystemslib.signer import CryptoSigner
    seed = hashlib.sha256(name.encode()).digest()
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed))


def _text(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data


def _length(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _take(buffer: bytearray) -> tuple[int, bytes] | None:
    """The first whole packet, removed from the buffer: its first byte, and its body."""
    size = shift = 0
    for at in range(1, min(len(buffer), 5)):
        size |= (buffer[at] & 0x7F) << shift
        shift += 7
        if not buffer[at] & 0x80:
            end = at + 1 + size
            if len(buffer) < end:
                return None
            packet = buffer[0], bytes(buffer[at + 1 : end])
            del buffer[:end]
            return packet
    return None
