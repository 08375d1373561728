# SPDX-License-Identifier: Apache-2.0
"""The printed Mosquitto configuration holds: real certificates, 45 acts, and who is let in."""

from __future__ import annotations

import datetime
import ipaddress
import os
import queue
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import installed
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from serving import WAIT_S

from edgecascade.client import Client
from edgecascade.errors import NetworkError
from edgecascade.service import mqtt
from edgecascade.service.broker import (
    BrokerSetup,
    access_list,
    free_port,
    mosquitto_config,
)
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing
from edgecascade.service.tls import SecureSocket

AGENT, OTHER = "dev-0001-agent", "dev-0002-agent"
NAMES = ("dev-0001", "dev-0002", AGENT, OTHER, "agent-7", "operator", "boss")
DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority that lives for a test."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self.key, authority=True)
        self._write(name, self.key, self.certificate)

    def issue(self, name: str, *, days: int = 30, server: bool = False, file: str = "") -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(file or name, key, self._sign(name, key, days=days, server=server))

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        days: int = 30,
        server: bool = False,
        authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(issuer, critical=False)  # Python 3.13 wants it
        )
        if authority:
            builder = builder.add_extension(_SIGNS, critical=True)
            own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            builder = builder.add_extension(own, critical=False)
        else:
            usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([here]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def _write(
        self, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> None:
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / f"{name}.key").write_bytes(private)
        (self.folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))


_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Peer:
    """A connection with a certificate, and what it saw."""

    def __init__(
        self, broker: Broker, name: str, *filters: str, file: str = "", will: Outgoing | None = None
    ) -> None:
        self.got: queue.Queue[Incoming] = queue.Queue()
        self.reasons: queue.Queue[int] = queue.Queue()
        file = file or name
        address = broker_address(
            broker.url,
            ca_file=broker.folder / "ca.crt",
            cert_file=broker.folder / f"{file}.crt",
            key_file=broker.folder / f"{file}.key",
        )
        self.link = Link(
            LinkOptions(address, name, filters, will=will, forget=True),
            self.got.put,
            on_result=lambda message, reason: self.reasons.put(reason),
        )
        self.link.start()

    def publishes(self, topic: str, payload: bytes) -> int:
        """The broker's reason code."""
        assert self.link.publish(Outgoing(topic, payload))
        return self.reasons.get(timeout=WAIT_S)


class Broker:
    """Mosquitto with the printed files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"mqtts://127.0.0.1:{self.port}"
        setup = BrokerSetup(
            port=self.port,
            folder=str(folder),
            data=str(folder),
            operators=("operator", "boss"),
            pools={"lab": ["dev-0001"]},
        )
        config = mosquitto_config(setup) + ("user root\n" if os.geteuid() == 0 else "")
        (folder / "mosquitto.conf").write_text(config)
        (folder / "acl").write_text(access_list(setup))
        (folder / "acl").chmod(0o600)
        command = [installed.broker().path, "-c", str(folder / "mosquitto.conf")]
        self.log = open(folder / "log", "wb")  # noqa: SIM115  closed by close()
        self.process = subprocess.Popen(command, stderr=self.log)

    def wait(self) -> Broker:
        for _ in range(500):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            time.sleep(0.02)
        raise AssertionError("mosquitto does not listen")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.log.close()


Join = Callable[..., Peer]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("broker")
    authority = Authority(folder, "ca")
    authority.issue("broker", server=True)
    for name in NAMES:
        authority.issue(name)
    authority.issue("dev-0001", days=-1, file="expired")
    Authority(folder, "other-ca").issue("dev-0001", file="intruder")
    broker = Broker(folder)
    yield broker.wait()
    broker.close()


@pytest.fixture
def join(broker: Broker) -> Iterator[Join]:
    with ExitStack() as stack:

        def joined(name: str, *filters: str, **options: object) -> Peer:
            peer = Peer(broker, name, *filters, **options)  # type: ignore[arg-type]
            stack.callback(peer.link.stop)
            assert peer.link.wait_up(WAIT_S), peer.link.reason
            return peer

        yield joined


P = "edgecascade/v1"
MAY_PUBLISH = [
    ("dev-0001", f"{P}/d/dev-0001/status"),
    ("dev-0001", f"{P}/d/dev-0001/telemetry"),
    ("dev-0001", f"{P}/c/agent-7/r/dev-0001/request-1"),
    ("agent-7", f"{P}/d/dev-0001/chat/agent-7"),
    ("agent-7", f"{P}/d/dev-0001/cancel/agent-7"),
    ("agent-7", f"{P}/pool/lab/chat/agent-7"),
    (AGENT, f"{P}/d/{AGENT}/status"),
    (AGENT, f"{P}/d/{AGENT}/jobs/order-1"),
    (AGENT, f"{P}/d/{AGENT}/standing"),
    (AGENT, f"{P}/repo/get/{AGENT}"),
    ("boss", f"{P}/g/all/announce"),
    ("boss", f"{P}/d/{AGENT}/cmd/install"),
]
MUST_NOT_PUBLISH = [
    ("dev-0001", f"{P}/d/dev-0002/status"),
    ("dev-0001", f"{P}/c/agent-7/r/dev-0002/request-1"),
    ("agent-7", f"{P}/d/dev-0001/chat/dev-0002"),
    ("agent-7", f"{P}/d/dev-0001/cancel/dev-0002"),
    ("agent-7", f"{P}/c/dev-0002/status"),
    ("agent-7", f"{P}/d/dev-0001/info"),
    ("dev-0001", f"{P}/g/all/announce"),
    ("dev-0001", f"{P}/d/{AGENT}/jobs/order-1"),
    (AGENT, f"{P}/g/all/announce"),
    (AGENT, f"{P}/d/{AGENT}/cmd/install"),
    (AGENT, f"{P}/d/{OTHER}/jobs/order-1"),
    (AGENT, f"{P}/d/{OTHER}/standing"),
    ("dev-0001", f"{P}/d/{AGENT}/standing"),
    (AGENT, f"{P}/repo/get/{OTHER}"),
    (AGENT, f"{P}/repo/rx/{AGENT}"),
]
MAY_READ = [
    ("dev-0001", f"{P}/d/dev-0001/chat/+", f"{P}/d/dev-0001/chat/agent-7"),
    ("dev-0001", f"$share/lab/{P}/pool/lab/chat/+", f"{P}/pool/lab/chat/agent-7"),
    ("agent-7", f"{P}/c/agent-7/r/+/+", f"{P}/c/agent-7/r/dev-0001/request-1"),
    (AGENT, f"{P}/g/all/announce", f"{P}/g/all/announce"),
    (AGENT, f"{P}/d/{AGENT}/cmd/+", f"{P}/d/{AGENT}/cmd/install"),
    (AGENT, f"{P}/repo/rx/{AGENT}", f"{P}/repo/rx/{AGENT}"),
]
MUST_NOT_READ = [
    ("dev-0002", f"{P}/d/dev-0001/chat/+", f"{P}/d/dev-0001/chat/agent-7"),
    ("dev-0002", "#", f"{P}/c/agent-7/r/dev-0001/secret"),
    ("dev-0002", f"{P}/c/+/r/+/+", f"{P}/c/agent-7/r/dev-0001/secret"),
    ("dev-0002", f"$share/lab/{P}/pool/lab/chat/+", f"{P}/pool/lab/chat/agent-7"),
    ("dev-0002", f"$share/x/{P}/d/dev-0001/chat/+", f"{P}/d/dev-0001/chat/agent-7"),
    (OTHER, f"{P}/d/{AGENT}/cmd/+", f"{P}/d/{AGENT}/cmd/install"),
    (OTHER, f"{P}/repo/rx/{AGENT}", f"{P}/repo/rx/{AGENT}"),
    ("dev-0001", f"{P}/d/+/jobs/+", f"{P}/d/{AGENT}/jobs/order-1"),
    ("dev-0001", f"{P}/d/+/cmd/+", f"{P}/d/{AGENT}/cmd/install"),
]


def test_the_matrix_has_45_acts() -> None:
    lists = (MAY_PUBLISH, MUST_NOT_PUBLISH, MAY_READ, MUST_NOT_READ)
    assert sum(map(len, lists)) + 3 == 45  # the last will, the client id, the foreign prefix


@pytest.mark.parametrize(("who", "topic"), MAY_PUBLISH)
def test_may_publish(join: Join, who: str, topic: str) -> None:
    watcher = join("operator", f"{P}/#")
    assert join(who).publishes(topic, b"hello") < 0x80
    assert watcher.got.get(timeout=WAIT_S).topic == topic


@pytest.mark.parametrize(("who", "topic"), MUST_NOT_PUBLISH)
def test_must_not_publish(join: Join, who: str, topic: str) -> None:
    watcher = join("operator", f"{P}/#")
    assert join(who).publishes(topic, b"hello") == 0x87
    watcher.publishes(f"{P}/g/sync", b"")
    assert watcher.got.get(timeout=WAIT_S).topic == f"{P}/g/sync"


@pytest.mark.parametrize(("who", "pattern", "topic"), MAY_READ)
def test_may_read(join: Join, who: str, pattern: str, topic: str) -> None:
    reader = join(who, pattern)
    join("operator").publishes(topic, b"hello")
    assert reader.got.get(timeout=WAIT_S).topic == topic


@pytest.mark.parametrize(("who", "pattern", "topic"), MUST_NOT_READ)
def test_must_not_read(join: Join, who: str, pattern: str, topic: str) -> None:
    own = f"{P}/c/{who}/r/dev-0001/sync"
    reader = join(who, pattern, f"{P}/c/{who}/r/+/+")
    operator = join("operator")
    operator.publishes(topic, b"hello")
    operator.publishes(own, b"")
    assert reader.got.get(timeout=WAIT_S).topic == own


def test_a_last_will_on_another_s_topic_is_not_spoken(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "WILL_DELAY_S", 0)
    watcher = join("operator", f"{P}/d/+/status")
    for device in ("dev-0001", "dev-0002"):
        peer = join("dev-0002", will=Outgoing(f"{P}/d/{device}/status", device.encode()))
        with monkeypatch.context() as hung_up:
            hung_up.setattr(Link, "_leave", lambda self, client: None)
            peer.link.stop()
    assert watcher.got.get(timeout=WAIT_S).payload == b"dev-0002"


def test_nobody_takes_over_another_s_connection(join: Join, broker: Broker) -> None:
    own = f"{P}/c/dev-0001/r/+/+"
    real = join("dev-0001", own)
    thief = Peer(broker, "dev-0001", own, file="dev-0002")
    assert thief.link.wait_up(WAIT_S)  # but as dev-0002, which its certificate says
    join("operator").publishes(f"{P}/c/dev-0001/r/dev-0002/secret", b"")
    assert real.got.get(timeout=WAIT_S).topic.endswith("secret")
    assert thief.got.empty()
    assert real.link.counters.losses == 0
    thief.link.stop()


def test_topics_outside_the_prefix_are_closed(join: Join) -> None:
    assert join("agent-7").publishes("elsewhere", b"") == 0x87


# paho leaves the socket of a failed handshake to the garbage collector.
UNCLOSED = "ignore::pytest.PytestUnraisableExceptionWarning"


@pytest.mark.filterwarnings(UNCLOSED)
@pytest.mark.parametrize("file", ["expired", "intruder"])
def test_a_bad_certificate_is_not_let_in(broker: Broker, file: str) -> None:
    peer = Peer(broker, "dev-0001", file=file)
    try:
        assert not peer.link.wait_up(2.0)
    finally:
        peer.link.stop()
    own = {"cert": str(broker.folder / f"{file}.crt"), "key": str(broker.folder / f"{file}.key")}
    refused_at_once(broker, "certificate expired" if file == "expired" else "unknown ca", **own)


@pytest.mark.filterwarnings(UNCLOSED)
def test_a_refusal_is_heard_also_by_who_speaks_late(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = SecureSocket.send

    def late(self: SecureSocket, *args: Any, **options: Any) -> int:
        time.sleep(0.2)  # the broker has closed meanwhile
        return send(self, *args, **options)

    monkeypatch.setattr(SecureSocket, "send", late)
    own = {"cert": str(broker.folder / "expired.crt"), "key": str(broker.folder / "expired.key")}
    refused_at_once(broker, "certificate expired", **own)


@pytest.mark.filterwarnings(UNCLOSED)
def test_none_is_not_let_in(broker: Broker) -> None:
    address = broker_address(broker.url, ca_file=broker.folder / "ca.crt")
    link = Link(LinkOptions(address, "dev-0001", ()), print)
    link.start()
    try:
        assert not link.wait_up(2.0)
    finally:
        link.stop()
    refused_at_once(broker, "certificate required")


def refused_at_once(broker: Broker, word: str, **own: str) -> None:
    began = time.monotonic()
    with pytest.raises(NetworkError, match=rf"{word}; check the port, and the client certificate"):
        Client(broker.url, ca=str(broker.folder / "ca.crt"), **own).connect(WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2


@pytest.mark.filterwarnings(UNCLOSED)
def test_a_broker_that_nobody_vouches_for_is_not_trusted(broker: Broker) -> None:
    link = Link(LinkOptions(broker_address(broker.url), "dev-0001", ()), print)
    link.start()
    try:
        assert not link.wait_up(2.0)
        assert "certificate" in link.reason.lower()
    finally:
        link.stop()
    began = time.monotonic()
    with pytest.raises(NetworkError, match=r"is not trusted: .*; give what vouches for it as ca"):
        Client(broker.url).connect(WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2


def test_passwords_are_the_other_way() -> None:
    text = mosquitto_config(BrokerSetup(certificates=False))
    assert "password_file /etc/mosquitto/edgecascade/passwords" in text
    assert "use_username_as_clientid true" in text
    assert "require_certificate" not in text
    assert "allow_anonymous false" in text
