# SPDX-License-Identifier: Apache-2.0
"""Brokers: one on loopback for the demo and the tests, and the configuration of a real one.

A local broker takes a free port, leaves no file behind and ends with the process that started it,
whatever way that ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

from edgecascade.errors import InvalidRequest, NetworkError
from edgecascade.service.leash import leashed
from edgecascade.service.topics import DEFAULT_PREFIX, Topics, is_name

log = logging.getLogger(__name__)

VARIABLE = "EDGECASCADE_MOSQUITTO"
# Debian keeps it in /usr/sbin, which is not in a user's PATH.
FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/bin")
START_S = 10.0
STOP_S = 5.0
TRIES = 3  # a free port may be taken before the broker listens there

# CONNECT of MQTT 5 with clean start and no client id; both brokers answer it with CONNACK.
_CONNECT = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x00"

# The kernel means the thread that started it when it says parent: one that stays.
_SPAWNER = ThreadPoolExecutor(1, "broker-spawner")

_LOCAL_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
max_packet_size 1048576
max_inflight_messages 20
max_queued_messages 10000
log_dest stderr
log_type error
log_type warning
{user}"""

_IOTCORE_CONFIG = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "local"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 200
dynamic_filters = true
"""
# It takes a file whose name ends in .toml, and only until it has read it.
_IOTCORE_MAIN = """
import shutil, sys, tempfile
from iotcore.iotcore import IotCoreBroker
with tempfile.NamedTemporaryFile(suffix=".toml") as config:
    shutil.copyfileobj(sys.stdin.buffer, config)
    config.flush()
    broker = IotCoreBroker(config_path=config.name)
broker.run_forever()
"""


@dataclass(frozen=True)
class BrokerProgram:
    """A broker that can be started here."""

    kind: str
    path: str

    @property
    def full(self) -> bool:
        """Whether it knows access lists, client certificates and reason codes."""
        return self.kind == "mosquitto"


def find_broker(kind: str | None = None) -> BrokerProgram:
    """Mosquitto if installed, else the iotcore package; `kind` asks for one of them.

    Raises:
        NetworkError: when there is none, saying how to install one.
    """
    if kind in (None, "mosquitto") and (path := _mosquitto()):
        return BrokerProgram("mosquitto", path)
    if kind in (None, "iotcore") and importlib.util.find_spec("iotcore"):
        return BrokerProgram("iotcore", sys.executable)
    raise NetworkError(
        f"no {kind or 'MQTT broker'} on this machine; sudo apt install mosquitto, "
        f"or pip install iotcore, or name a mosquitto binary in ${VARIABLE}"
    )


def _mosquitto() -> str | None:
    if named := os.environ.get(VARIABLE):
        return named
    for folder in (None, *FOLDERS):
        if found := shutil.which("mosquitto", path=folder):
            return found
    return None


class LocalBroker:
    """A broker on loopback, for as long as the `with` block.

    with LocalBroker() as broker:
        serve(broker.url)
    """

    def __init__(
        self, program: BrokerProgram | None = None, *, extra_config: str = "", port: int = 0
    ) -> None:
        self.program = program or find_broker()
        self.port = port
        self._extra = extra_config
        self._fixed = port != 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Address for a service or a client."""
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id while it runs."""
        if self._process is None:
            raise NetworkError("the broker is not running; start() it")
        return self._process.pid

    def start(self) -> LocalBroker:
        """Start, and return once it answers; again after kill(), on the same port.

        Raises:
            NetworkError: with the broker's own words when it does not.
        """
        for attempt in range(TRIES):
            if not self._fixed:
                self.port = free_port()
            self._spawn()
            if self._ready():
                self._fixed = True  # clients know it now
                return self
            said = self._end(signal.SIGKILL)
            log.info("%s did not start, attempt %d: %s", self.program.kind, attempt + 1, said)
        raise NetworkError(f"{self.program.kind} does not start: {said or 'no message'}")

    def kill(self) -> None:
        """SIGKILL, as a test's disaster."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the broker."""
        self._end(signal.SIGTERM)

    def __enter__(self) -> LocalBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self) -> None:
        # Files without a name: who is killed cannot remove one.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by _end
        with tempfile.TemporaryFile() as config:
            config.write(self._config().encode())
            config.seek(0)
            self._process = _SPAWNER.submit(
                subprocess.Popen,
                leashed(self._command()),
                cwd="/",
                stdin=config,
                stdout=self._log,
                stderr=self._log,
            ).result()

    def _command(self) -> list[str]:
        if self.program.kind == "iotcore":
            return [sys.executable, "-c", _IOTCORE_MAIN]
        return [self.program.path, "-c", "/dev/stdin"]

    def _config(self) -> str:
        if self.program.kind == "iotcore":
            return _IOTCORE_CONFIG.format(port=self.port)
        user = "user root\n" if os.geteuid() == 0 else ""  # else it gives up its rights and files
        return _LOCAL_CONFIG.format(port=self.port, user=user) + self._extra

    def _ready(self) -> bool:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process and self._process.poll() is None:
            if answers(self.port):
                return True
            time.sleep(0.02)
        return False

    def _end(self, how: signal.Signals) -> str:
        process, self._process = self._process, None
        said, self._log = self._log, None
        if process is None or said is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with said:
            said.seek(0)
            return said.read().decode("utf-8", "replace")[-500:].strip()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether an MQTT broker answers on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as probe:
            probe.settimeout(1.0)
            probe.sendall(_CONNECT)
            return probe.recv(1) == b"\x20"
    except OSError:
        return False


@dataclass(frozen=True)
class BrokerSetup:
    """Choices for a broker that faces a network. `certificates` false: user names and passwords."""

    prefix: str = DEFAULT_PREFIX
    port: int = 8883
    folder: str = "/etc/mosquitto/edgecascade"
    data: str = "/var/lib/mosquitto"
    certificates: bool = True
    operators: Sequence[str] = ("operator",)
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Topics(self.prefix)
        if not 1 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; it must be in [1, 65535]")
        for folder in (self.folder, self.data):
            if not (folder.startswith("/") and folder.isprintable()):
                raise InvalidRequest(f"folder is {folder!r}; give an absolute path")
        names = [*self.operators, *self.pools, *(d for pool in self.pools.values() for d in pool)]
        for name in names:
            if not is_name(name):
                raise InvalidRequest(f"{name!r} is no name; give 1 to 64 of A-Z a-z 0-9 _ -")


def mosquitto_config(setup: BrokerSetup) -> str:
    """mosquitto.conf: TLS only, every name proven, nothing unbounded."""
    if setup.certificates:
        identity = f"""\
# The certificate's common name is the user name, and the user name is the client id: without the
# last line any client could take over another's connection by connecting with its id.
require_certificate true
use_identity_as_username true
use_username_as_clientid true
# crlfile {setup.folder}/revoked.pem
"""
    else:
        identity = f"""\
# mosquitto_passwd -c {setup.folder}/passwords NAME
password_file {setup.folder}/passwords
# The user name is the client id: nobody takes over another's connection by using its id.
use_username_as_clientid true
"""
    return f"""\
# Mosquitto for EdgeCascade. Save as {setup.folder}/mosquitto.conf, with the access list beside it.
listener {setup.port}
cafile {setup.folder}/ca.crt
certfile {setup.folder}/broker.crt
keyfile {setup.folder}/broker.key
tls_version tlsv1.3
{identity}
allow_anonymous false
allow_zero_length_clientid false
acl_file {setup.folder}/acl

# A request waits for its acknowledgement: without this each one takes 40 ms more.
set_tcp_nodelay true
max_packet_size 1048576
max_inflight_messages 20
# An operator of a fleet is sent two retained messages for each device at once; what exceeds this
# is dropped.
max_queued_messages 100000
max_queued_bytes 33554432
max_keepalive 3600
persistent_client_expiration 7d

persistence true
persistence_location {setup.data}/
autosave_interval 60
"""


def access_list(setup: BrokerSetup) -> str:
    """The ACL file: who may publish and read what. %u is the proven name."""
    topics = Topics(setup.prefix)
    operators = "".join(
        f"user {name}\ntopic readwrite {setup.prefix}/#\ntopic read $SYS/#\n\n"
        for name in setup.operators
    )
    pools = "".join(
        f"\nuser {device}\ntopic read {topics.pool_chat(pool, '+')}\n"
        for pool, devices in setup.pools.items()
        for device in devices
    )
    return f"""\
# Access list for EdgeCascade topics.

# operators
{operators}# everyone as a device under its own name
pattern write {topics.status("%u")}
pattern write {topics.info("%u")}
pattern write {topics.telemetry("%u")}
pattern read {topics.chat("%u", "+")}
pattern read {topics.cancel("%u", "+")}
pattern read {topics.client_status("+")}
pattern write {topics.reply("+", "%u", "+")}

# everyone as an agent under its own name: reads orders, reports, asks for small files
pattern read {topics.announce("+")}
pattern read {topics.command("%u", "+")}
pattern write {topics.job("%u", "+")}
pattern write {topics.standing("%u")}
pattern write {topics.repo_get("%u")}
pattern read {topics.repo_rx("%u")}

# everyone as a client under its own name
pattern write {topics.chat("+", "%u")}
pattern write {topics.cancel("+", "%u")}
pattern write {topics.pool_chat("+", "%u")}
pattern write {topics.client_status("%u")}
pattern read {topics.reply("%u", "+", "+")}
pattern read {topics.status("+")}
pattern read {topics.info("+")}

# a pool's requests reach its devices only
{pools}"""
