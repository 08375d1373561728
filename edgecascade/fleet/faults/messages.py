# SPDX-License-Identifier: Apache-2.0
"""Orders that come twice, late, in another order, not at all, or were never signed.

An operator signs a rollout or two. The broker belongs to somebody else: every message that was ever
sent may come again at any time, or be dropped, changed, cut, swollen, or signed by a stranger. The
device's intake, updater and store are the real ones. It ends where the last order says, and on the
way it never obeys anything but the operator.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from edgecascade.errors import UpdateRefused
from edgecascade.fleet import orders
from edgecascade.fleet.clock import Now
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.sim import SimFiles
from edgecascade.fleet.faults.world import (
    GROUP,
    NOW,
    Device,
    Published,
    Violation,
    World,
    check_device,
    last_word,
    order_for,
    publish,
    require,
    seeds,
)
from edgecascade.fleet.intake import Envelope, Intake, Offer, Result
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES, Action, Order, OrderKey, OrderKeys
from edgecascade.fleet.refresh import Refreshed, Trust
from edgecascade.fleet.release import Release
from edgecascade.service import wire

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

TITLE = "orders that come twice, late, changed, or were never signed"
FULL = 2000
SHORT = 200

DEVICE = "robot-1"
RELEASES = 4


def _signer() -> CryptoSigner:
    with fleet_extra():
        from securesystemslib.signer import CryptoSigner
    return CryptoSigner.generate_ed25519()


@dataclass
class _Trust:
    """A repository that is always there; who attacks it is in class F11."""

    keys: OrderKeys
    published: list[Published]
    belief: None = None

    def refresh(self, system: float) -> Refreshed:
        """Nothing is new."""
        return Refreshed(self.keys, NOW + 1.0, self.now(system))

    def order_keys(self, system: float) -> OrderKeys:
        """See Trust."""
        return self.keys

    def now(self, system: float) -> Now:
        """See Trust."""
        return Now(NOW, False)

    def release(self, name: str, version: str, sha256: str) -> tuple[Release, bytes]:
        """See Trust."""
        for each in self.published:
            if each.sha256 == sha256:
                return each.release, each.document
        raise UpdateRefused("the repository has no such release", reason="unknown-release")


@dataclass
class _Scene:
    """An operator, a device, and what was said so far."""

    rng: random.Random
    signer: CryptoSigner = field(default_factory=_signer)
    stranger: CryptoSigner = field(default_factory=_signer)
    sent: list[bytes] = field(default_factory=list)
    said: list[Order] = field(default_factory=list)  # all that the operator signed
    heard: int = 0  # the highest of his that was delivered
    faults: int = 0

    def __post_init__(self) -> None:
        self.published = [publish(self.rng, 1)]
        for seq in range(2, RELEASES + 1):
            self.published.append(publish(self.rng, seq, base=self.published[-1]))
        self.world = World(self.published, room_for_two=self.rng.random() < 0.5)
        self.files = SimFiles()
        self.device = Device(self.files, self.world).boot()
        key = OrderKey("operator", public_hex(self.signer.public_key))
        trust = cast("Trust", _Trust(OrderKeys(1, 0, (key,)), self.published))
        self.intake = Intake(
            [trust], lambda folder: trust, DEVICE, [GROUP], lambda release: "", self._take, rest_s=0
        )

    def _take(self, result: Result) -> None:
        if isinstance(result, Offer):
            require(
                any(result.order == order for order in self.said),
                f"obeyed what nobody signed: {result.order}",
            )
            self.device.executor.offer(result.order, result.document, result.refusal)
            self.device.settle()

    def deliver(self, data: bytes) -> None:
        """The broker hands something over."""
        self.intake.take(Envelope(data))
        seqs = self.device.state.seqs.get(GROUP, 0)
        require(seqs <= self.heard, f"order {seqs} is believed, {self.heard} was the last")

    def deliver_own(self, index: int) -> None:
        """A message of the operator, as he sent it."""
        self.heard = max(self.heard, self.said[index].seq)
        before = self.device.state.seqs.get(GROUP, 0)
        self.deliver(self.sent[index])
        require(self.device.state.seqs.get(GROUP, 0) >= before, "the sequence went back")

    def say(self, order: Order) -> None:
        """The operator signs."""
        self.said.append(order)
        self.sent.append(orders.sign(order, [self.signer]))

    def restart(self) -> None:
        """The device's process is new."""
        self.device = Device(self.files, self.world).boot()
        self.device.settle()


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See edgecascade.fleet.faults."""
    tried, failures = 0, []
    for each in seeds(seed):
        if case is not None:
            each = int(case)
        scene = _Scene(random.Random(each))
        try:
            _play(scene)
        except (Violation, Exception) as error:  # noqa: BLE001  whatever it is, it was not survived
            failures.append(Failure(str(each), f"{type(error).__name__}: {error}"))
        tried += scene.faults
        if tried >= count or case is not None:
            return Outcome(tried, tuple(failures))
    raise AssertionError("seeds do not end")


def _play(scene: _Scene) -> None:
    rng = scene.rng
    script = _script(scene)
    late: list[int] = []
    for index, order in enumerate(script):
        scene.say(order)
        fate = rng.random()
        if fate < 0.2:
            scene.faults += 1  # dropped; a retained message is replaced by the next
        elif fate < 0.4:
            scene.faults += 1
            late.append(index)
        else:
            scene.deliver_own(index)
        for _ in range(rng.randrange(1, 6)):
            scene.faults += 1
            _disturb(scene)
        while late and rng.random() < 0.4:
            scene.deliver_own(late.pop(rng.randrange(len(late))))
        if rng.random() < 0.15:
            scene.faults += 1
            scene.restart()
    for index in late:
        scene.deliver_own(index)
    scene.deliver_own(len(script) - 1)  # what is retained comes at each connection
    _judge(scene, script)


def _script(scene: _Scene) -> list[Order]:
    """Some rollouts, one after the other, each with its stages and whims."""
    rng, seq, script = scene.rng, 10, []
    for what in scene.published[: rng.randrange(1, RELEASES + 1)]:
        name = f"rollout-{what.release.seq}"
        order = order_for(what, seq, name)
        stages: list[Action] = rng.choices(("install", "pause", "resume"), k=rng.randrange(4))
        for action in ("install", *stages):
            seq += rng.randrange(1, 4)
            script.append(replace(order, seq=seq, action=action))
        if rng.random() < 0.3:
            seq += 1
            last: Action = rng.choice(("abort", "rollback"))
            script.append(replace(order, seq=seq, action=last))
    return script


def _disturb(scene: _Scene) -> None:
    """One thing that somebody else sends."""
    rng = scene.rng
    if rng.random() < 0.4:
        # The latest of these may be news to the device: then it is the operator's word.
        scene.deliver_own(rng.randrange(len(scene.sent)))
        return
    data = rng.choice(scene.sent)
    scene.deliver(rng.choice(FORGERIES)(scene, data))


def _flip(scene: _Scene, data: bytes) -> bytes:
    """One bit, somewhere that counts: base64 has bits that mean nothing."""
    body = bytearray(data)
    at = scene.rng.randrange(len(body))
    body[at] ^= 1 << scene.rng.randrange(7)
    try:
        same = wire.decode(bytes(body)) == wire.decode(data)
        same = same or orders.unverified(bytes(body)) == orders.unverified(data)
    except (ValueError, TypeError, KeyError, AttributeError):
        same = False
    return data[:-2] if same else bytes(body)


def _cut(scene: _Scene, data: bytes) -> bytes:
    return data[: scene.rng.randrange(len(data))]


def _swollen(scene: _Scene, data: bytes) -> bytes:
    return data + b" " * (MAX_ENVELOPE_BYTES - len(data) + scene.rng.randrange(1, 1000))


def _junk(scene: _Scene, data: bytes) -> bytes:
    junk = (b"", b"null", b"[]", b"{}", b"[" * 10_000, b'{"payload":"e30="}', b"\xff\xfe", b"NaN")
    return scene.rng.choice((*junk, scene.rng.randbytes(scene.rng.randrange(200))))


def _changed(scene: _Scene, data: bytes) -> Order:
    """An order nobody gave: later, for all, of another release."""
    rng, order = scene.rng, orders.unverified(data)
    changes: list[dict[str, Any]] = [
        {"seq": order.seq + rng.randrange(1, 1000)},
        {"seq": 2**31, "action": "abort"},
        {"order": "mine", "seq": order.seq + 1},
        {"release_sha256": rng.choice(scene.published).sha256, "seq": order.seq + 50},
        {"device": DEVICE, "seq": order.seq + 5, "action": "rollback"},
        {"expires": order.expires + 1e9, "seq": order.seq + 1},
    ]
    return replace(order, **rng.choice(changes))


def _foreign(scene: _Scene, data: bytes) -> bytes:
    return orders.sign(_changed(scene, data), [scene.stranger])


def _unsigned(scene: _Scene, data: bytes) -> bytes:
    return orders.sign(_changed(scene, data), [])


def _grafted(scene: _Scene, data: bytes) -> bytes:
    """A good signature on another payload."""
    forged = wire.decode(orders.sign(_changed(scene, data), [scene.signer]))
    return wire.encode({**forged, "signatures": wire.decode(data)["signatures"]})


FORGERIES: tuple[Callable[[_Scene, bytes], bytes], ...] = (
    _flip, _cut, _swollen, _junk, _foreign, _unsigned, _grafted,
)  # fmt: skip


def _judge(scene: _Scene, script: list[Order]) -> None:
    """Where the device ends."""
    device, last = scene.device, script[-1]
    state = device.state
    require(state.seqs.get(GROUP) == last.seq, f"{state.seqs} instead of {last.seq}")
    ordered = {order.release_sha256 for order in script}
    for slot in state.slots:
        require(slot.release in ordered, f"release {slot.version} was never ordered")
    if last.action == "install":
        active = state.active
        require(active is not None and active.release == last.release_sha256, f"on {active}")
        word = last_word(scene.world, last.order)
        require(word is not None and word.state == "SUCCEEDED", f"reported {word}")
    if state.update is None:
        check_device(device)
    elif not state.update.paused:
        raise Violation(f"an update does not end: {state.update}")
