# SPDX-License-Identifier: Apache-2.0
"""A connection to a broker that is kept up. The only file that knows paho.

One thread owns the socket and makes every paho call; other threads put messages into a bounded
queue and wake it. Each connection gets a new paho client: what must survive a lost connection is
the queue here, so paho never resends what the broker refused. docs/mqtt.md §7 lists what this
works around.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgecascade.backoff import backoff_s
from edgecascade.errors import NetworkError
from edgecascade.service.config import BrokerAddress
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import PACKET_HEAD_BYTES, Outgoing
from edgecascade.service.tls import SecureSocket, tls_context, untrusted

log = logging.getLogger(__name__)

MAX_WAITING = 1000  # messages of QoS 1 that wait for the broker
MAX_CHUNKS = 128  # beyond this many waiting messages, tokens are held back and sent together
MAX_CROWD = 2 * MAX_CHUNKS  # so many, more than chunks alone, and no request is read
MAX_IN_FLIGHT = 20  # unacknowledged; a broker may ask for less
CONNECT_S = 5.0
ANSWER_S = 10.0  # from CONNECT to CONNACK
STALE_S = 60.0  # a network thread that has not turned for so long is stuck
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 30.0
WILL_DELAY_S = 5
STEADY_S = 1.0  # a connection lost sooner counts as a failed one
SHORT_FAILURES = 2  # that count after it: the next try is within 8 s
MANY_SHORT = 4
NO_LIMIT = 1 << 28  # bytes of the largest packet of MQTT
LEAST_LIMIT = 4096  # no broker takes less

UNSUPPORTED_VERSION = 0x84
SESSION_TAKEN_OVER = 0x8E
# Refusals that another try does not change, and what does. All others may pass, as "Server busy".
WAY_OUT = {
    0x84: "let the protocol be auto",
    0x85: "give another client id",
    0x86: "check the user name and the password",
    0x87: "check the user name, the password or the certificate, and the broker's access list",
    0x8A: "ask who runs the broker",
    0x8C: "give a user name and a password, or a certificate",
    0x9C: "connect to that server",
    0x9D: "connect to that server",
}
PROTOCOLS = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}


@dataclass(frozen=True)
class LinkOptions:
    """Who connects, what it listens to, and what others hear if it vanishes.

    `forget` ends the broker's session at stop(), for a name that will not come back.
    """

    address: BrokerAddress
    client_id: str
    filters: tuple[str, ...]
    will: Outgoing | None = None
    session_expiry_s: int = 300
    receive_maximum: int = 64
    max_packet_bytes: int = 1 << 20
    forget: bool = False


@dataclass
class LinkCounters:
    """What happened so far, for telemetry."""

    connects: int = 0
    losses: int = 0
    chunks_held: int = 0
    refused: int = 0
    denied: int = 0
    oversize: int = 0
    received: int = 0


@dataclass
class _Connection:
    """State of one connection; of the network thread alone."""

    client: paho.Client
    opened_at: float
    acknowledged: bool = False
    refusal: int | None = None
    gave_up: bool = False
    socket: Any = None
    window: int = MAX_IN_FLIGHT
    unacked: dict[int, Outgoing] = field(default_factory=dict)
    acks: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def alert(self) -> ssl.SSLError | None:
        """What TLS said when it ended."""
        return self.socket.alert if isinstance(self.socket, SecureSocket) else None


class Link:
    """A connection that comes back by itself. All callbacks run on its thread and must not block.

    `births` are published at every connection, after the subscriptions; `on_result` hears the
    broker's reason code for each acknowledged message.
    """

    def __init__(
        self,
        options: LinkOptions,
        on_message: Callable[[Incoming], None],
        *,
        births: Callable[[], Iterable[Outgoing]] = tuple,
        on_up: Callable[[], None] | None = None,
        on_result: Callable[[Outgoing, int], None] | None = None,
    ) -> None:
        self.counters = LinkCounters()
        self.fatal: str | None = None
        self.reason = "not tried yet"
        self.max_payload_bytes = NO_LIMIT
        self._learned_limit = NO_LIMIT
        self._largest_acked = 0
        self._options = options
        self._on_message, self._births = on_message, births
        self._on_up, self._on_result = on_up, on_result
        self._version = options.address.protocol.replace("auto", "5")
        self._unanswered = self._short = 0
        # Of the queue; never held while paho runs. The garbage collector may end a client's stream
        # while we hold it, and that publishes a cancellation.
        self._lock = threading.RLock()
        self._waiting: deque[Outgoing] = deque()
        self._in_flight = 0
        self._up = threading.Event()
        self._decided = threading.Event()  # the broker took us, or refused and will not change
        self._stopping = threading.Event()
        self._again = threading.Event()  # subscribe once more
        self._beat = time.monotonic()
        self._thread: threading.Thread | None = None
        # Sockets, not a pipe: a closed one is an error, where the number of a closed pipe may be
        # another file by then.
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._rung = False

    def start(self) -> None:
        """Begin to connect, also again after stop(); returns at once."""
        if self._thread is not None:
            return
        address = self._options.address
        if address.username is not None and not address.private:
            log.warning("the password goes to %s in the clear: use mqtts://", address.shown)
        self._stopping.clear()
        self._decided.clear()
        self.fatal, self._beat = None, time.monotonic()
        self._bell, self._rung = socket.socketpair(), False
        for end in self._bell:
            end.setblocking(False)
        name = f"mqtt-{self._options.client_id}"
        self._thread = threading.Thread(
            target=self._run, args=self._bell[:1], name=name, daemon=True
        )
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether it connects, or tries to."""
        return self._thread is not None and not self._stopping.is_set()

    def connect(self, timeout_s: float) -> None:
        """start(), and wait until the broker has accepted the connection.

        Raises:
            NetworkError: when it does not, with the reason and stopped; at once where no further
                try would be answered otherwise.
        """
        self.start()
        self._decided.wait(timeout_s)
        if not self._up.is_set():
            reason = self.fatal or self.reason
            self.stop()
            shown = self._options.address.shown
            raise NetworkError(f"no connection to the broker at {shown}: {reason}")

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it is connected, within a time."""
        return self._up.wait(timeout_s)

    @property
    def up(self) -> bool:
        """Whether it is connected."""
        return self._up.is_set()

    @property
    def alive(self) -> bool:
        """Whether the network thread turns."""
        return (
            self._thread is not None
            and self._thread.is_alive()
            and time.monotonic() - self._beat < STALE_S
        )

    @property
    def can_stream(self) -> bool:
        """Whether a chunk would go out now; if not, hold the tokens and send them together."""
        if self._up.is_set() and len(self._waiting) < MAX_CHUNKS:
            return True
        self.counters.chunks_held += 1
        return False

    @property
    def crowded(self) -> bool:
        """Whether so much waits to go out that nothing should be done that makes more."""
        return len(self._waiting) >= MAX_CROWD

    def publish(self, *messages: Outgoing) -> bool:
        """Queue messages; False if not all were: one is too large, the queue is full, or it is a
        chunk and nobody is connected.
        """
        with self._lock:
            taken = [self._enqueue(message) for message in messages]
        if any(taken):
            self._wake()
        return all(taken)

    def _enqueue(self, message: Outgoing) -> bool:
        if message.size > self.max_payload_bytes:
            self.counters.oversize += 1
            log.error("%d bytes for %s exceed the broker's limit", message.size, message.topic)
            return False
        room = MAX_WAITING if message.qos else MAX_CHUNKS
        if len(self._waiting) >= room or not (message.qos or self._up.is_set()):
            self.counters.refused += 1
            return False
        self._waiting.append(message)
        return True

    def refresh(self) -> None:
        """Subscribe again: every retained message comes once more, and the births go out."""
        self._again.set()
        self._wake()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged everything; False if it does not in time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with self._lock:
                if not self._waiting and not self._in_flight:
                    return True
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        """Disconnect and end the thread; what still waits is dropped."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(CONNECT_S + ANSWER_S)
            if self._thread.is_alive():
                log.error("the network thread does not end")
                return
        with self._lock:
            self._waiting.clear()
        if self._bell is not None:
            for end in self._bell:
                end.close()
        self._thread = self._bell = None

    def _wake(self) -> None:
        bell = self._bell
        if bell is not None and not self._rung:
            self._rung = True  # one call for many messages
            with contextlib.suppress(OSError):  # closed: nobody sleeps
                bell[1].send(b"x")

    # From here on everything runs on the network thread.

    def _run(self, bell: socket.socket) -> None:
        failures = 0
        while not self._stopping.is_set() and self.fatal is None:
            worked, connects = False, self.counters.connects
            try:
                worked = self._connection(bell)
            except (ssl.SSLEOFError, ssl.SSLSyscallError) as error:  # cut meanwhile
                self.reason = str(error)
            except ssl.SSLError as error:
                self._refused(untrusted(error))
            except NetworkError as error:  # files of ours that cannot be used
                self._refused(str(error))
            except OSError as error:
                self.reason = str(error) or type(error).__name__
            except Exception as error:  # a dead network thread would be silence
                self.reason = f"{type(error).__name__}: {error}"
                log.exception("the connection to %s failed", self._options.address.shown)
            if self.counters.connects > connects:  # it took us, so it is there: not long away
                failures = min(failures, SHORT_FAILURES)
            failures = 0 if worked else failures + 1
            if self.fatal is not None:
                self._decided.set()
            elif not self._stopping.is_set():
                # Jitter over the whole span: a thousand devices must not come back together.
                delay = random.uniform(0, backoff_s(failures + 1, FIRST_DELAY_S, MAX_DELAY_S))
                log.info("broker: %s; next try in %.1f s", self.reason, delay)
                self._beat = time.monotonic()
                self._pause(delay)

    def _refused(self, reason: str) -> None:
        """Go on trying, as a password may be renewed; but who waits to begin need not wait."""
        self.reason = reason
        self._decided.set()

    def _pause(self, delay_s: float) -> None:
        end = time.monotonic() + delay_s
        while not self._stopping.wait(min(5.0, max(0.0, end - time.monotonic()))):
            self._beat = time.monotonic()
            if time.monotonic() >= end:
                return

    def _connection(self, bell: socket.socket) -> bool:
        """One connection from its start to its loss; whether it was one worth the name."""
        client = self._client()
        connection = _Connection(client, time.monotonic())
        self._install(connection)
        self._open(client)
        try:
            self._turn(connection, bell)
        finally:
            self._lost(connection)
        self._choose_version(connection)
        steady = time.monotonic() - connection.opened_at > STEADY_S
        self._short = self._short + 1 if connection.acknowledged and not steady else 0
        if self._short == MANY_SHORT:
            # Two clients of one name take it from each other, and not every broker tells them.
            log.warning(
                "connections to %s are short; does another client use the name %r?",
                self._options.address.shown,
                self._options.client_id,
            )
        return connection.acknowledged and (steady or connection.gave_up)

    def _choose_version(self, connection: _Connection) -> None:
        """MQTT 3.1.1 after a refusal of 5, and after two connections closed without a word."""
        if connection.acknowledged or self._options.address.protocol != "auto":
            return
        if connection.refusal is None:
            self._unanswered += 1
        if connection.refusal == UNSUPPORTED_VERSION or self._unanswered == 2:
            self._unanswered = 0
            self._version = "3.1.1" if self._version == "5" else "5"
            self.reason = f"{self.reason}; next MQTT {self._version}"

    def _client(self) -> paho.Client:
        options, address = self._options, self._options.address
        five = self._version == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            clean_session=None if five else options.forget,
            protocol=PROTOCOLS[self._version],
            reconnect_on_failure=False,
        )
        client.suppress_exceptions = True  # an error in a callback is logged, the thread goes on
        client.enable_logger(log)
        client.connect_timeout = CONNECT_S
        if address.username is not None:
            client.username_pw_set(address.username, address.secret())
        if address.tls:
            client.tls_set_context(tls_context(address))
        if options.will is not None:
            will = options.will
            properties = _properties(PacketTypes.WILLMESSAGE) if five else None
            if properties is not None:
                properties.WillDelayInterval = WILL_DELAY_S
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        return client

    def _open(self, client: paho.Client) -> None:
        options, address = self._options, self._options.address
        if self._version != "5":
            client.connect(address.host, address.port, address.keepalive_s)
            return
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = options.session_expiry_s
        properties.ReceiveMaximum = options.receive_maximum
        properties.MaximumPacketSize = options.max_packet_bytes
        client.connect(
            address.host,
            address.port,
            address.keepalive_s,
            clean_start=False,
            properties=properties,
        )

    def _install(self, connection: _Connection) -> None:
        client = connection.client

        def opened(_c: Any, _u: Any, opened_socket: Any) -> None:
            # A token is a small packet: without this the next one waits for its acknowledgement.
            opened_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.socket = opened_socket

        def connected(_c: Any, _u: Any, _flags: Any, reason: Any, properties: Any) -> None:
            self._answered(connection, reason, properties)

        def message(_c: Any, _u: Any, received: paho.MQTTMessage) -> None:
            self.counters.received += 1
            try:
                self._on_message(_incoming(received))
            except Exception:  # paho would keep it to itself
                log.exception("a message of %d bytes is not handled", len(received.payload))

        def published(_c: Any, _u: Any, mid: int, reason: Any, _p: Any) -> None:
            connection.acks.append((mid, reason.value))

        def subscribed(_c: Any, _u: Any, _mid: int, reasons: Any, _p: Any) -> None:
            for name, reason in zip(self._options.filters, reasons, strict=False):
                if reason.is_failure:
                    log.error("the broker refuses the subscription to %s: %s", name, reason)
                    self.counters.denied += 1
            self._subscribed(connection)

        def disconnected(_c: Any, _u: Any, _flags: Any, reason: Any, _p: Any) -> None:
            if connection.acknowledged:
                self.reason = f"lost: {reason}"
            elif connection.alert is not None:
                self._refused(untrusted(connection.alert))
            elif connection.refusal is None:
                self.reason = "it hangs up without an answer"
            if reason.value == SESSION_TAKEN_OVER:
                self.fatal = (
                    f"another client connected as {self._options.client_id!r}; give each its own id"
                )

        client.on_socket_open = opened
        client.on_connect = connected
        client.on_message = message
        client.on_publish = published
        client.on_subscribe = subscribed
        client.on_disconnect = disconnected

    def _answered(self, connection: _Connection, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            connection.refusal = reason.value
            self._not_accepted(reason, properties)
            return
        asked = getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT)
        connection.window = min(MAX_IN_FLIGHT, asked)
        largest = getattr(properties, "MaximumPacketSize", NO_LIMIT)
        self.max_payload_bytes = min(largest - PACKET_HEAD_BYTES, self._learned_limit)
        # Always: the session may be gone with the broker's memory, whatever it says.
        if self._options.filters:
            connection.client.subscribe(self._subscriptions())
        else:
            self._subscribed(connection)

    def _not_accepted(self, reason: Any, properties: Any) -> None:
        said = [getattr(properties, name, None) for name in ("ReasonString", "ServerReference")]
        words = [str(word)[:200] for word in said if word]
        self.reason = ": ".join(["refused", str(reason), *words])
        auto = self._options.address.protocol == "auto"
        if reason.value in WAY_OUT and not (auto and reason.value == UNSUPPORTED_VERSION):
            self._refused(f"{self.reason}; {WAY_OUT[reason.value]}")

    def _subscribed(self, connection: _Connection) -> None:
        """From here on nothing that is sent to us is missed: say that we are there."""
        with self._lock:
            self._waiting.extendleft(reversed(list(self._births())))
        if connection.acknowledged:
            return  # a refresh
        connection.acknowledged = True
        self.counters.connects += 1
        self.reason = "connected"
        self._up.set()
        self._decided.set()
        log.info("connected to %s with MQTT %s", self._options.address.shown, self._version)
        if self._on_up is not None:
            self._on_up()

    def _subscriptions(self) -> Any:
        if self._version != "5":
            return [(name, 1) for name in self._options.filters]
        # As published: a retained request must be told from a fresh one when it is new, too.
        return [
            (
                name,
                SubscribeOptions(
                    qos=1,
                    retainAsPublished=True,
                    retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE,
                ),
            )
            for name in self._options.filters
        ]

    def _turn(self, connection: _Connection, bell: socket.socket) -> None:
        """Read, write and keep alive until the connection is lost or not wanted."""
        client = connection.client
        while (sock := client.socket()) is not None:
            self._beat = now = time.monotonic()
            if self._stopping.is_set():
                self._leave(client)
                return
            if not connection.acknowledged and now - connection.opened_at > ANSWER_S:
                self.reason = f"no answer within {ANSWER_S:g} s"
                return
            readable = _wait(sock, bell, writing=client.want_write())
            self._rung = False  # before anything is looked at: what comes now rings again
            if readable:
                if client.loop_read():
                    return
                _acknowledge_soon(sock)
            self._settle(connection)
            if connection.acknowledged and self._again.is_set():
                self._again.clear()
                client.subscribe(self._subscriptions())
            self._pump(connection)
            if client.want_write() and client.loop_write():
                return
            if client.loop_misc():
                return

    def _leave(self, client: paho.Client) -> None:
        properties = None
        if self._options.forget and self._version == "5":
            properties = _properties(PacketTypes.DISCONNECT)
            properties.SessionExpiryInterval = 0
        client.disconnect(properties=properties)
        client.loop_write()

    def _pump(self, connection: _Connection) -> None:
        """Hand waiting messages to paho while the socket takes them and the broker allows it."""
        if not self._waiting:
            return
        client = connection.client
        heard = client.on_publish
        with _together(connection.socket, len(self._waiting)):
            while connection.acknowledged and not client.want_write():
                with self._lock:
                    if not self._waiting:
                        break
                    if self._waiting[0].qos and len(connection.unacked) >= connection.window:
                        break
                    message = self._waiting.popleft()
                    self._in_flight += bool(message.qos)
                # To tell of a chunk that was sent, paho makes objects at 50 us.
                client.on_publish = heard if message.qos else None
                sent = client.publish(
                    message.topic,
                    message.payload,
                    message.qos,
                    message.retain,
                    self._properties(message),
                )
                if message.qos:
                    connection.unacked[sent.mid] = message
        client.on_publish = heard

    def _properties(self, message: Outgoing) -> Any:
        asked = (
            message.correlation, message.content_type, message.response_topic, message.expiry_s,
        )  # fmt: skip
        if self._version != "5" or asked == (None, None, None, None):
            return None  # each costs 40 us
        properties = _properties(PacketTypes.PUBLISH)
        names = ("CorrelationData", "ContentType", "ResponseTopic", "MessageExpiryInterval")
        for name, value in zip(names, asked, strict=True):
            if value is not None:
                setattr(properties, name, value)
        return properties

    def _settle(self, connection: _Connection) -> None:
        while connection.acks:
            mid, reason = connection.acks.popleft()
            message = connection.unacked.pop(mid, None)
            if message is None:
                continue
            with self._lock:
                self._in_flight -= 1
            self._largest_acked = max(self._largest_acked, message.size)
            if reason >= 0x80:
                self.counters.denied += 1
                log.warning("the broker refuses a message to %s: 0x%02x", message.topic, reason)
            if self._on_result is not None:
                self._on_result(message, reason)

    def _lost(self, connection: _Connection) -> None:
        self._up.clear()
        self._settle(connection)
        if connection.acknowledged:
            self._decided.clear()
            self.counters.losses += 1
        if self._short >= MANY_SHORT and connection.unacked:
            self._give_up_largest(connection)
        with self._lock:
            # Tokens of the past are of no use; finals are. A birth is made anew.
            kept = [*connection.unacked.values(), *(m for m in self._waiting if m.qos)]
            most = self.max_payload_bytes
            self._waiting = deque(m for m in kept if not m.retain and m.size <= most)
            self._in_flight = 0
        if (lost := connection.client.socket()) is not None:
            with contextlib.suppress(OSError):
                lost.close()

    def _give_up_largest(self, connection: _Connection) -> None:
        """Connections end as soon as we send: MQTT 3.1.1 has no other word for "too large"."""
        number, suspect = max(connection.unacked.items(), key=lambda item: item[1].size)
        least = max(self._largest_acked, LEAST_LIMIT)
        if suspect.size <= least:
            return  # as large ones went through
        del connection.unacked[number]
        connection.gave_up = True
        self._learned_limit = max(least, suspect.size // 2)
        self.max_payload_bytes = min(self.max_payload_bytes, self._learned_limit)
        self.counters.oversize += 1
        log.error("%d bytes for %s are given up: connections end", suspect.size, suspect.topic)


def _wait(sock: Any, bell: socket.socket, *, writing: bool) -> bool:
    """Until there is something to read, to write or to do; whether there is to read."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    # poll, because select cannot watch a file number beyond 1023.
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.register(bell, select.POLLIN)
    events = dict(poll.poll(1000))
    if bell.fileno() in events:
        with contextlib.suppress(BlockingIOError):
            bell.recv(4096)
    return bool(events.get(sock.fileno(), 0) & ~select.POLLOUT)


def _properties(kind: int) -> Any:
    return Properties(kind)  # type: ignore[no-untyped-call]


def _acknowledge_soon(sock: Any) -> None:
    # The kernel holds back acknowledgements up to 40 ms, and Mosquitto's Nagle waits for them.
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


@contextlib.contextmanager
def _together(sock: Any, messages: int) -> Iterator[None]:
    """Chunks of one beat leave in one segment, and wake the broker once."""
    if messages < 2 or not hasattr(socket, "TCP_CORK"):
        yield
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    yield
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def _incoming(received: paho.MQTTMessage) -> Incoming:
    properties = received.properties
    return Incoming(
        topic=received.topic,
        payload=bytes(received.payload),
        retain=received.retain,
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        content_type=getattr(properties, "ContentType", None),
    )
