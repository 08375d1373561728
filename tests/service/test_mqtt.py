# SPDX-License-Identifier: Apache-2.0
"""The connection: it comes back, keeps what matters, and never blocks who uses it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import installed
import pytest
from proxy import Proxy

from edgecascade.client import Client
from edgecascade.errors import NetworkError
from edgecascade.service import mqtt
from edgecascade.service.broker import LocalBroker, free_port
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import MAX_WAITING, Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing

WAIT_S = 20.0


class Box:
    """A link and what it received."""

    def __init__(self, url: str, name: str, *filters: str, **options: object) -> None:
        self.got: queue.Queue[Incoming] = queue.Queue()
        self.results: queue.Queue[tuple[Outgoing, int]] = queue.Queue()
        protocol = str(options.pop("protocol", "auto"))
        births = options.pop("births", tuple)
        values = LinkOptions(broker_address(url, protocol=protocol), name, filters, **options)  # type: ignore[arg-type]
        self.link = Link(
            values,
            self.got.put,
            births=births,  # type: ignore[arg-type]
            on_result=lambda message, reason: self.results.put((message, reason)),
        )

    def next(self) -> Incoming:
        return self.got.get(timeout=WAIT_S)


Opener = Callable[..., Box]


@pytest.fixture
def connect() -> Iterator[Opener]:
    boxes = []

    def opened(url: str, name: str, *filters: str, wait: bool = True, **options: object) -> Box:
        box = Box(url, name, *filters, **options)
        boxes.append(box)
        box.link.start()
        assert not wait or box.link.wait_up(WAIT_S)
        return box

    yield opened
    for box in boxes:
        box.link.stop()


def until(holds: Callable[[], bool], within_s: float = WAIT_S) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return False


def ready(box: Box, topic: str) -> None:
    """Returns once the box's subscriptions work."""
    for _ in range(200):
        box.link.publish(Outgoing(topic, b"ready?"))
        with contextlib.suppress(queue.Empty):
            box.got.get(timeout=0.1)
            break
    with contextlib.suppress(queue.Empty):
        while box.got.get(timeout=0.2):
            pass


def test_a_message_keeps_its_properties(any_broker: LocalBroker, connect: Opener) -> None:
    box = connect(any_broker.url, "one", "t/#")
    ready(box, "t/a")
    box.link.publish(
        Outgoing(
            "t/a",
            b"\x00payload",
            correlation=b"\xff\x00",
            content_type="application/json",
            response_topic="t/answers",
            expiry_s=77,
        )
    )
    told = box.next()
    assert (told.topic, told.payload, told.retain) == ("t/a", b"\x00payload", False)
    assert (told.correlation, told.content_type) == (b"\xff\x00", "application/json")
    assert (told.response_topic, told.expiry_s) == ("t/answers", 77)


def test_a_fresh_retained_message_is_told_as_such(mosquitto: LocalBroker, connect: Opener) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    box.link.publish(Outgoing("t/a", b"kept", retain=True))
    assert box.next().retain


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What is asked of sockets, by setsockopt."""
    asked: list[tuple[int, ...]] = []
    real = socket.socket.setsockopt

    def spy(self: socket.socket, *args: int) -> None:
        asked.append(args)
        real(self, *args)

    monkeypatch.setattr(socket.socket, "setsockopt", spy)
    return asked


def test_nagle_and_delayed_acknowledgements_are_off(
    asked: list[tuple[int, ...]], mosquitto: LocalBroker, connect: Opener
) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in asked
    assert (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1) in asked


def test_a_denied_or_unheard_message_is_reported(mosquitto: LocalBroker, connect: Opener) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    while not box.results.empty():
        box.results.get()
    box.link.publish(Outgoing("elsewhere", b""))
    message, reason = box.results.get(timeout=WAIT_S)
    assert (message.topic, reason) == ("elsewhere", 0x10)


def test_messages_of_one_turn_leave_together_and_in_order(
    asked: list[tuple[int, ...]], mosquitto: LocalBroker, connect: Opener
) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    asked.clear()
    turn = [Outgoing("t/a", b"%d" % number, qos=number % 2) for number in range(9)]
    assert box.link.publish(*turn)
    assert [box.next().payload for _ in turn] == [message.payload for message in turn]
    corks = [value for level, name, value in asked if name == socket.TCP_CORK]
    assert corks[:2] == [1, 0]
    assert box.link.flush(WAIT_S)
    assert not box.link.publish(Outgoing("t/a", b"small"), Outgoing("t/a", b"x" * (1 << 20)))
    assert box.next().payload == b"small"


def test_it_comes_back_and_delivers_what_waited(mosquitto: LocalBroker, connect: Opener) -> None:
    births = [Outgoing("t/birth", b"here", retain=True)]
    box = connect(mosquitto.url, "one", "t/#", births=lambda: births)
    ready(box, "t/a")
    mosquitto.kill()
    assert until(lambda: not box.link.up)
    assert not box.link.publish(Outgoing("t/token", b"", qos=0))
    for index in range(50):
        assert box.link.publish(Outgoing("t/final", b"%d" % index))
    mosquitto.start()  # it has forgotten the subscriptions
    assert box.link.wait_up(WAIT_S)
    got = [box.next() for _ in range(51)]
    assert [m.payload for m in got if m.topic == "t/final"] == [b"%d" % i for i in range(50)]
    assert b"here" in [m.payload for m in got]
    assert box.link.counters.losses == 1


def test_queues_are_bounded_while_the_broker_sleeps(
    mosquitto: LocalBroker, connect: Opener
) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    os.kill(mosquitto.pid, signal.SIGSTOP)
    try:
        big = b"x" * 50_000
        sent = 0
        while box.link.can_stream and sent < 5000:
            box.link.publish(Outgoing("t/token", big, qos=0))
            sent += 1
        assert sent < 5000
        assert not box.link.publish(Outgoing("t/token", big, qos=0))
        assert not box.link.crowded  # else nobody could cancel what streams to a slow broker
        accepted = sum(box.link.publish(Outgoing("t/final", b"")) for _ in range(2 * MAX_WAITING))
        assert 0 < accepted <= MAX_WAITING
        assert box.link.crowded
    finally:
        os.kill(mosquitto.pid, signal.SIGCONT)
    assert box.link.flush(WAIT_S)
    finals = 0
    while finals < accepted:
        finals += box.next().topic == "t/final"
    assert box.link.counters.losses == 0


def test_a_message_over_the_broker_s_limit_is_not_sent(
    mosquitto: LocalBroker, connect: Opener
) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    assert not box.link.publish(Outgoing("t/a", b"x" * (1 << 20)))
    assert box.link.counters.oversize == 1
    assert box.link.publish(Outgoing("t/a", b"small"))
    assert box.next().payload == b"small"
    assert box.link.counters.losses == 0


def test_a_message_that_ends_each_connection_is_given_up(tmp_path: Path) -> None:
    small = LocalBroker(installed.broker("mosquitto"), extra_config="max_packet_size 8192\n")
    with small as broker:
        box = Box(broker.url, "one", "t/#", protocol="3.1.1")  # which has no word for the limit
        box.link.start()
        try:
            assert box.link.wait_up(WAIT_S)
            ready(box, "t/a")
            assert box.link.publish(Outgoing("t/large", b"x" * 20_000))
            assert box.link.publish(Outgoing("t/small", b"after it"))
            assert until(lambda: box.link.counters.oversize == 1, 90.0)
            assert until(lambda: "t/small" in {message.topic for message in list(box.got.queue)})
            assert box.link.max_payload_bytes == 10_000
            assert not box.link.publish(Outgoing("t/large", b"x" * 20_000))
            assert box.link.flush(WAIT_S)
        finally:
            box.link.stop()


@pytest.mark.parametrize(("sizes", "acked"), [((200, 4096), 0), ((200, 9000), 9000)])
def test_nothing_is_given_up_that_a_broker_takes(sizes: tuple[int, ...], acked: int) -> None:
    link = Link(LinkOptions(broker_address("mqtt://broker"), "one", ()), print)
    link._short, link._largest_acked = 100, acked  # a network that keeps failing
    sent = {number: Outgoing("t", b"x" * size) for number, size in enumerate(sizes)}
    link._lost(mqtt._Connection(link._client(), 0.0, unacked=dict(sent)))
    assert list(link._waiting) == list(sent.values())
    assert link.counters.oversize == 0


def test_correlation_data_counts_to_a_message_s_size(
    mosquitto: LocalBroker, connect: Opener
) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    most = box.link.max_payload_bytes
    correlation = b"x" * 1000
    assert not box.link.publish(Outgoing("t/a", b"x" * (most - 999), correlation=correlation))
    assert box.link.publish(Outgoing("t/a", b"x" * (most - 1000), correlation=correlation))
    assert box.next().correlation == correlation
    assert box.link.counters.losses == 0


def test_a_failing_callback_does_not_silence_it(mosquitto: LocalBroker, connect: Opener) -> None:
    box = connect(mosquitto.url, "one", "t/#")
    ready(box, "t/a")
    real = box.link._on_message

    def fails_once(message: Incoming) -> None:
        box.link._on_message = real
        raise RuntimeError("a bug")

    box.link._on_message = fails_once
    box.link.publish(Outgoing("t/a", b"1"))
    box.link.publish(Outgoing("t/a", b"2"))
    assert box.next().payload == b"2"
    assert box.link.alive


def test_the_will_speaks_for_the_dead(mosquitto: LocalBroker, connect: Opener) -> None:
    watcher = connect(mosquitto.url, "watcher", "t/#")
    ready(watcher, "t/a")
    proxy = Proxy(mosquitto.port)
    with proxy:
        connect(proxy.url, "mortal", will=Outgoing("t/will", b"offline", retain=True))
        proxy.closed = True
        proxy.cut()
        assert watcher.next().payload == b"offline"


def test_a_connection_taken_over_is_given_up(mosquitto: LocalBroker, connect: Opener) -> None:
    with Proxy(mosquitto.port) as proxy:
        first = connect(proxy.url, "same")
        proxy.say(b"\xe0\x02\x8e\x00")  # DISCONNECT, session taken over; Mosquitto 2.0 omits it
        assert until(lambda: not first.link.alive)
        assert "'same'" in str(first.link.fatal)


def test_two_clients_of_one_name_back_off(mosquitto: LocalBroker, connect: Opener) -> None:
    boxes = [connect(mosquitto.url, "same"), connect(mosquitto.url, "same")]
    time.sleep(6.0)  # without a pause they would kick each other a hundred times
    assert sum(box.link.counters.connects for box in boxes) < 20


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "hangs-up"])
def test_an_old_broker_gets_mqtt_3(mosquitto: LocalBroker, connect: Opener, silent: bool) -> None:
    with Proxy(mosquitto.port, only_3=True, silent=silent) as proxy:
        box = connect(proxy.url, "one", "t/#")
        assert proxy.versions[0] == 5
        assert proxy.versions[-1] == 4
        ready(box, "t/a")
        box.link.publish(Outgoing("t/a", b"hello", correlation=b"not in MQTT 3"))
        told = box.next()
        assert (told.payload, told.correlation) == (b"hello", None)
        box.link.stop()


def test_file_numbers_beyond_a_thousand_work(mosquitto: LocalBroker, connect: Opener) -> None:
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        box = connect(mosquitto.url, "one", "t/#")
        ready(box, "t/a")
    finally:
        for each in held:
            os.close(each)


def test_stop_ends_the_thread_even_without_a_broker(connect: Opener) -> None:
    before = threading.active_count()
    box = connect(f"mqtt://127.0.0.1:{free_port()}", "one", wait=False)
    assert until(lambda: "refused" in box.link.reason)
    assert box.link.alive
    box.link.stop()
    assert threading.active_count() == before


def test_a_broker_that_is_away_for_hours_is_still_tried(
    connect: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Link, "_pause", lambda link, delay_s: pauses.append(delay_s))
    box = connect(f"mqtt://127.0.0.1:{free_port()}", "one", wait=False)
    assert until(lambda: len(pauses) > 1_100 or not box.link.alive)
    assert box.link.alive
    assert max(pauses) <= mqtt.MAX_DELAY_S


def mosquitto_password(user: str, password: str) -> str:
    """A line of its password file: PBKDF2 with SHA-512."""
    salt, rounds = b"0123456789ab", 101
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds, 64)
    coded = "$".join(base64.b64encode(part).decode() for part in (salt, digest))
    return f"{user}:$7${rounds}${coded}\n"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[LocalBroker]:
    """A broker that lets robot in, with the password "right"."""
    known = tmp_path / "known"
    known.write_text(mosquitto_password("robot", "right"))
    known.chmod(0o600)
    settings = f"allow_anonymous false\npassword_file {known}\n"
    with LocalBroker(installed.broker("mosquitto"), extra_config=settings) as broker:
        yield broker


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
@pytest.mark.parametrize("name", [None, "robot"])
def test_a_refusal_that_will_not_change_is_told_at_once(
    guarded: LocalBroker, protocol: str, name: str | None
) -> None:
    client = Client(guarded.url, username=name, password="wrong", protocol=protocol)
    began, threads = time.monotonic(), threading.active_count()
    with pytest.raises(NetworkError, match=r"127.0.0.1.*Not authorized; check the user name"):
        client.connect(WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2
    assert threading.active_count() == threads
    with Client(guarded.url, username="robot", password="right", protocol=protocol) as client:
        assert client.devices() == {}


def connack(code: int, properties: bytes = b"") -> bytes:
    """An answer of MQTT 5."""
    return bytes([0x20, 3 + len(properties), 0, code, len(properties)]) + properties


@pytest.mark.parametrize(
    ("answer", "protocol", "told"),
    [
        (b"\x20\x02\x00\x04", "3.1.1", "Bad user name or password; check the user name"),
        (b"\x20\x02\x00\x05", "3.1.1", "Not authorized; check the user name"),
        (b"\x20\x02\x00\x02", "3.1.1", "Client identifier not valid; give another client id"),
        (connack(0x84), "5", "Unsupported protocol version; let the protocol be auto"),
        (connack(0x85), "auto", "Client identifier not valid; give another client id"),
        (connack(0x86), "auto", "Bad user name or password; check"),
        (connack(0x87, b"\x1f\x00\x05maybe"), "5", "Not authorized: maybe; check"),
        (connack(0x8A), "auto", "Banned; ask who runs"),
        (connack(0x9D, b"\x1c\x00\x05other"), "5", "Server moved: other; connect to that"),
    ],
)
def test_each_refusal_names_the_way_out(
    mosquitto: LocalBroker, answer: bytes, protocol: str, told: str
) -> None:
    with Proxy(mosquitto.port, refusals=[answer]) as proxy:
        with pytest.raises(NetworkError, match=told):
            Client(proxy.url, protocol=protocol).connect(WAIT_S)
        assert len(proxy.versions) == 1


def test_a_broker_that_is_busy_is_tried_again(mosquitto: LocalBroker) -> None:
    busy = [connack(0x89), connack(0x88), connack(0x97), connack(0x9F)]
    with Proxy(mosquitto.port, refusals=busy) as proxy:
        with Client(proxy.url, protocol="5").connect(120.0) as client:
            assert client.devices() == {}
        assert len(proxy.versions) == 5
    with (
        Proxy(mosquitto.port, refusals=[b"\x20\x02\x00\x03"] * 100) as proxy,
        pytest.raises(NetworkError, match="refused: Server unavailable"),
    ):
        Client(proxy.url, protocol="3.1.1").connect(1.0)


def test_a_broker_that_hangs_up_is_said_to(mosquitto: LocalBroker) -> None:
    with (
        Proxy(mosquitto.port, refusals=[b""] * 100) as proxy,
        pytest.raises(NetworkError, match="hangs up without an answer"),
    ):
        Client(proxy.url, protocol="5").connect(1.0)


def test_a_renewed_password_is_taken_up_at_the_next_connection(tmp_path: Path) -> None:
    known, own = tmp_path / "known", tmp_path / "own"

    def renew(password: str) -> None:
        known.write_text(mosquitto_password("robot", password))
        known.chmod(0o600)
        own.write_text(f"{password}\n")

    renew("first")
    program = installed.broker("mosquitto")
    with LocalBroker(program, extra_config=f"password_file {known}\n") as broker:
        address = broker_address(broker.url, username="robot", password_file=own)
        link = Link(LinkOptions(address, "robot", ()), print)
        link.start()
        try:
            assert link.wait_up(WAIT_S)
            broker.kill()
            renew("second")
            own.write_text("first\n")
            broker.start()
            assert until(lambda: "Not authorized" in link.reason)
            renew("second")
            assert link.wait_up(WAIT_S)
            own.unlink()
            broker.kill()
            broker.start()
            assert until(lambda: "password_file" in link.reason)
        finally:
            link.stop()
