# SPDX-License-Identifier: Apache-2.0
"""Rollouts through a real Mosquitto: 60 virtual devices, killed controllers, other operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed
import pytest
from virtual_devices import virtual_devices

from edgecascade.errors import FleetError, InvalidRequest, NetworkError, UpdateRefused
from edgecascade.fleet import audit, orders, rollout
from edgecascade.fleet.faults.virtual import VirtualFleet
from edgecascade.fleet.operator import Controller, Operator, Signing, Turn, order_trouble
from edgecascade.fleet.orders import Cohort, Order, OrderKey, OrderKeys
from edgecascade.fleet.record import Record, Records
from edgecascade.fleet.register import Register
from edgecascade.fleet.rollout import Plan, Progress, Thresholds
from edgecascade.fleet.view import View
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import broker_address
from edgecascade.service.topics import Topics

DEVICES = 60
WAIT_S = 30.0
QUICK = Thresholds(lost_s=120.0, soak_s=0.0)  # a slow machine loses nobody


class Bench:
    """A broker, keys, and what a controller keeps on its disk."""

    def __init__(self, folder: Path, broker: LocalBroker) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from securesystemslib.signer import CryptoSigner

        from edgecascade.fleet.keys import public_hex

        self.broker = broker
        self.records = Records(folder / "rollouts")
        self.register = Register(folder / "devices.json")
        self.log = folder / "audit.jsonl"
        self.signer = CryptoSigner(Ed25519PrivateKey.generate())
        public = public_hex(self.signer.public_key)
        self.keys = OrderKeys(1, 0, (OrderKey("operator", public),))
        self.signing = Signing(
            lambda order: orders.sign(order, [self.signer]),
            self._verified,
            lambda: self.keys.first_seq,
        )

    def _verified(self, envelope: bytes) -> Order | None:
        try:
            return orders.verify(envelope, self.keys, time.time())
        except UpdateRefused:
            return None

    def plan(self, name: str = "first", thresholds: Thresholds = QUICK) -> None:
        now = time.time()
        order = Order(
            order=name,
            seq=1,
            group="fleet",
            bundle="tiny",
            version="2.0",
            release_sha256="0" * 64,
            not_before=0.0,
            expires=now + 86_400,
            cohort=Cohort(name, 100),
        )
        with self.records.locked():
            seq = self.records.next_seq("fleet", self.keys.first_seq, now)
            record = Record(order, Plan(name, thresholds=thresholds), Progress(seq))
            self.records.write(record)

    @contextmanager
    def operator(self, name: str = "first", **options: Any) -> Iterator[Operator]:
        record = self.records.read(name)
        view = View(record.order, self.register.read(), record.believed)
        with Operator(
            broker_address(self.broker.url),
            options.get("client", "operator"),
            Topics(),
            view,
            group="fleet",
            order=name,
        ) as operator:
            operator.settle(WAIT_S)
            yield operator

    @contextmanager
    def controller(self, name: str = "first", **options: Any) -> Iterator[Controller]:
        with self.operator(name, **options) as operator:
            yield self.control(operator, name)

    def control(self, operator: Operator, name: str = "first") -> Controller:
        return Controller(operator, self.records, name, self.signing, self.log, self.register.read)

    @contextmanager
    def devices(self, count: int = DEVICES, **behaviour: Any) -> Iterator[VirtualFleet]:
        with virtual_devices(self.broker.port, self.keys, count, **behaviour) as fleet:
            self.register.enroll(fleet.keys_of(count), time.time())
            yield fleet

    def run(self, name: str = "first", show: Callable[[Turn], None] = lambda turn: None) -> Turn:
        with self.controller(name) as controller:
            return controller.run(show)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with LocalBroker(installed.broker()) as broker:
        yield Bench(tmp_path, broker)


def test_a_good_bundle_reaches_everybody(bench: Bench) -> None:
    bench.plan()
    with bench.devices() as fleet:
        turn = bench.run()
    assert turn.record.progress.state == "done"
    assert turn.tally.succeeded == fleet.exposed == DEVICES
    lines = [record for _, record in audit.records(bench.log) if record]
    assert lines[0]["device"] is not None, "the first stage is one device"
    assert lines[-1]["state"] == "done"
    assert audit.verify(bench.log).lines == len(lines)


def test_a_bad_bundle_stays_with_the_first_device(bench: Bench) -> None:
    bench.plan()
    with bench.devices(fails=1.0) as fleet:
        turn = bench.run()
        assert turn.record.progress.state == "aborted"
        assert fleet.exposed == 1


def test_a_device_that_falls_silent_ends_the_rollout(bench: Bench) -> None:
    bench.plan(thresholds=replace(QUICK, lost_s=1.5))
    with bench.devices(vanishes=1.0) as fleet:
        turn = bench.run()
    assert "lost on trial" in turn.record.progress.reason
    assert fleet.exposed == 1


def test_pause_stops_devices_and_resume_goes_on(bench: Bench) -> None:
    bench.plan()
    with bench.devices(5, phase_s=600.0) as fleet:
        with bench.controller() as controller:
            until(lambda: controller.turn().settled and any(d.job for d in fleet.devices))
        with bench.controller(client="second") as other:
            other.act(lambda record, fleet, now: rollout.pause(record.progress, now))
        assert bench.run().record.progress.reason == "by the operator"
        until(lambda: {d.job.phase for d in fleet.devices if d.job} == {"paused"})
        fleet.behaviour = replace(fleet.behaviour, phase_s=0.02)
        with bench.controller() as controller:
            controller.act(lambda r, fleet, now: rollout.resume(r.plan, r.progress, fleet, now))
            assert controller.run().record.progress.state == "done"
        assert fleet.exposed == 5


def test_rollback_reaches_everybody(bench: Bench) -> None:
    bench.plan()
    with bench.devices() as fleet:
        bench.run()
        with bench.controller() as controller:
            controller.act(lambda record, fleet, now: rollout.rollback(record.progress, now))
            with bench.operator(client="watcher") as watcher:
                until(lambda: rollout.going_back(watcher.look()) == (0, 0))
        assert {device.job.state for device in fleet.devices if device.job} == {"CANCELED"}


def test_a_broker_that_forgets_is_told_again(bench: Bench) -> None:
    bench.plan()
    with bench.devices(0), bench.operator() as operator:
        controller = bench.control(operator)
        controller.act(lambda record, fleet, now: rollout.pause(record.progress, now))
        before = operator.retained
        bench.broker.kill()
        bench.broker.start()
        until(lambda: operator.settled and operator.retained is None)
        controller.turn()
        assert operator.retained == before
    with bench.operator(client="late") as late:
        assert late.retained == before


def test_garbage_in_place_of_the_order_is_replaced(bench: Bench) -> None:
    bench.plan()
    with bench.operator() as operator, bench.operator(client="attacker") as attacker:
        controller = bench.control(operator)
        controller.act(lambda record, fleet, now: rollout.pause(record.progress, now))
        before = operator.retained
        attacker.announce(b"{}")
        until(lambda: operator.retained == b"{}")
        controller.turn()
        until(lambda: attacker.retained == before)


def test_an_order_of_another_operator_ends_the_rollout(bench: Bench) -> None:
    bench.plan()
    with bench.operator() as operator, bench.operator(client="colleague") as colleague:
        controller = bench.control(operator)
        turn = controller.act(lambda record, fleet, now: rollout.pause(record.progress, now))
        other = replace(turn.record.to_order(), order="theirs", seq=turn.record.progress.seq + 5)
        colleague.announce(bench.signing.sign(other))
        until(lambda: operator.retained != bench.signing.sign(turn.record.to_order()))
        with pytest.raises(
            FleetError, match=r"'theirs' with seq \d+ \(pause\) was announced"
        ) as caught:
            controller.turn()
        assert caught.value.reason == "overtaken"


def test_an_operator_is_told_what_the_broker_shows_in_place_of_his_order(bench: Bench) -> None:
    bench.plan()
    record = bench.records.read("first")
    assert order_trouble(record, None, bench.signing) == "", "nothing has been announced yet"
    paused = replace(record, progress=rollout.pause(record.progress, time.time()))
    order = paused.to_order()

    def trouble(retained: bytes | None) -> str:
        return order_trouble(paused, retained, bench.signing)

    def other(**changes: Any) -> str:
        return trouble(bench.signing.sign(replace(order, **changes)))

    assert trouble(bench.signing.sign(order)) == ""
    assert trouble(None) == "the broker retains no order for group 'fleet'"
    for nothing in (b"{}", b"\xff"):
        assert "is no order that is in force" in trouble(nothing)
    assert "is no order that is in force" in other(expires=time.time() - 1)
    assert "an older order: order 'first', seq" in other(seq=order.seq - 1, action="install")
    assert other(order="theirs", seq=order.seq + 1).startswith("overtaken: order 'theirs'")


def test_only_the_newest_rollout_of_a_group_can_be_changed(bench: Bench) -> None:
    bench.plan("first")
    bench.plan("second")
    with bench.controller("first") as controller, pytest.raises(InvalidRequest, match="second"):
        controller.act(lambda record, fleet, now: rollout.abort(record.progress, now))


def test_a_broker_that_refuses_orders_is_an_error(bench: Bench, tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write edgecascade/v1/d/operator/cmd/fence\n")
    with LocalBroker(installed.broker(), extra_config=f"acl_file {acl}\n") as broker:
        bench.broker = broker
        bench.plan()
        with bench.controller() as controller, pytest.raises(NetworkError, match="refuses orders"):
            controller.act(lambda record, fleet, now: rollout.pause(record.progress, now))


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.05)


def test_a_command_in_another_terminal_interrupts_a_controller_for_a_moment(bench: Bench) -> None:
    bench.plan()
    with bench.controller() as controller:
        assert controller.turn().settled
        with bench.controller() as other:  # under the same name
            other.act(lambda record, fleet, now: rollout.pause(record.progress, now))
            until(lambda: not controller.turn().settled)
        assert controller.run().record.progress.state == "paused"


def test_a_broker_that_is_away_for_a_while_is_waited_for(bench: Bench) -> None:
    bench.plan()
    with bench.devices(0), bench.operator() as operator:
        controller = bench.control(operator)
        bench.broker.kill()
        until(lambda: not controller.turn().settled)
        bench.broker.start()
        until(lambda: controller.turn().settled)
