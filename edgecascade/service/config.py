# SPDX-License-Identifier: Apache-2.0
"""What a service is told: a YAML file, command line options, or both; options win.

Keys are strict: one that is not read stops the start, so that a misspelt limit is never no limit.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from edgecascade.errors import InvalidRequest, NetworkError
from edgecascade.service.topics import DEFAULT_PREFIX, Topics, is_name

T = TypeVar("T")

SCHEMES = {"mqtt": 1883, "mqtts": 8883}
AWS_FLUSH_MS = 250  # AWS IoT Core discards what a connection publishes beyond 100 a second
PASSWORD_VARIABLE = "EDGECASCADE_MQTT_PASSWORD"


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and how to prove who we are."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None  # goes before `password`
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = 30

    @property
    def shown(self) -> str:
        """For logs: without the password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    @property
    def private(self) -> bool:
        """Whether nobody on the way can read along: TLS, or this machine."""
        try:
            return self.tls or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def secret(self) -> str | None:
        """The password as it is now: its file may have been renewed.

        Raises:
            NetworkError: when the file cannot be read.
        """
        if self.password_file is None:
            return self.password
        try:
            return self.password_file.read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise NetworkError(f"password_file {self.password_file}: {error}") from error


def broker_address(
    url: str,
    *,
    username: str | None = None,
    password: str | None = None,
    password_file: str | Path | None = None,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    protocol: str = "auto",
    keepalive_s: int = 30,
) -> BrokerAddress:
    """Read mqtt://[user[:password]@]host[:port] or mqtts://...

    Raises:
        InvalidRequest: naming what cannot be.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        # What it says holds parts of the address, which may be the password's.
        raise InvalidRequest(
            f"broker {masked(url)!r} is not an address; give mqtt://host:port or "
            "mqtts://host:port, with / ? # of a password written as %2F %3F %23"
        ) from error
    more = parts.path not in ("", "/") or parts.query or parts.fragment
    if parts.scheme not in SCHEMES or not parts.hostname or more or port == 0:
        shown = masked(url)
        raise InvalidRequest(f"broker is {shown!r}; give mqtt://host:port or mqtts://host:port")
    if protocol not in ("auto", "5", "3.1.1"):
        raise InvalidRequest(f"protocol is {protocol!r}; it must be auto, 5 or 3.1.1")
    if password_file is not None and not (username or parts.username):
        raise InvalidRequest("password_file is given without a username, and would not be sent")
    tls = parts.scheme == "mqtts"
    paths = [_readable(name, path) for name, path in
             (("ca", ca_file), ("cert", cert_file), ("key", key_file))]  # fmt: skip
    if any(paths) and not tls:
        raise InvalidRequest(f"certificates are given, but {masked(url)!r} is not mqtts://")
    if (paths[1] is None) != (paths[2] is None):
        raise InvalidRequest("a client certificate needs both cert and key")
    return BrokerAddress(
        host=parts.hostname,
        port=port or SCHEMES[parts.scheme],
        tls=tls,
        username=username or (unquote(parts.username) if parts.username else None),
        password=password or (unquote(parts.password) if parts.password else None),
        password_file=_readable("password_file", password_file),
        ca_file=paths[0],
        cert_file=paths[1],
        key_file=paths[2],
        protocol=protocol,  # type: ignore[arg-type]
        keepalive_s=keepalive_s,
    )


def masked(url: str) -> str:
    """An address for messages: without its password, also where that is not written as it must."""
    start = url.find("//") + 2 if "//" in url else 0
    return url[:start] + re.sub(r"(?s):.*@", ":***@", url[start:])


def _readable(name: str, path: str | Path | None) -> Path | None:
    if path is None:
        return None
    if not os.access(path, os.R_OK):
        raise InvalidRequest(f"{name} is {str(path)!r}, which cannot be read")
    return Path(path)


@dataclass(frozen=True)
class ServiceConfig:
    """All that a service needs to know besides its bundle. Names are the YAML's keys.

    `clients` None lets every client of the broker ask; `priority_clients` may use a priority below
    0. Rates are per client, 0 for none.
    """

    mqtt: str
    device_id: str
    prefix: str = DEFAULT_PREFIX
    pool: str | None = None
    model: str | None = None
    username: str | None = None
    password_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    protocol: str = "auto"
    keepalive_s: int = 30
    session_expiry_s: int = 300
    profile: str = "lan"
    flush_ms: int = 40
    max_request_bytes: int = 96 << 10
    max_timeout_s: float = 600.0
    max_completion_tokens: int = 4096
    max_requests_per_client: int = 64
    requests_per_minute: float = 0.0
    prompt_tokens_per_minute: float = 0.0
    clients: tuple[str, ...] | None = None
    priority_clients: tuple[str, ...] = ()
    telemetry_s: float = 30.0
    drain_s: float = 30.0
    state_dir: str | None = None

    def __post_init__(self) -> None:
        Topics(self.prefix)
        for name in ("device_id", "pool"):
            value = getattr(self, name)
            if not is_name(value) and not (name == "pool" and value is None):
                raise InvalidRequest(f"{name} is {value!r}; give 1 to 64 of A-Z a-z 0-9 _ -")
        check_ranges(
            self,
            keepalive_s=(5, 65_535),
            session_expiry_s=(0, 7 * 86_400),
            flush_ms=(0, 10_000),
            max_request_bytes=(1 << 10, 1 << 20),
            max_timeout_s=(1, 86_400),
            max_completion_tokens=(1, 2**31 - 1),
            max_requests_per_client=(1, 100_000),
            requests_per_minute=(0, 1_000_000),
            prompt_tokens_per_minute=(0, 1_000_000_000),
            telemetry_s=(1, 86_400),
            drain_s=(0, 3600),
        )
        if self.model == "":
            raise InvalidRequest("model is ''; leave it out to serve under the bundle's name")
        if self.profile not in ("lan", "aws"):
            raise InvalidRequest(f"profile is {self.profile!r}; it must be lan or aws")
        for name in (*(self.clients or ()), *self.priority_clients):
            if not is_name(name):
                raise InvalidRequest(f"client {name!r} must be 1 to 64 of A-Z a-z 0-9 _ -")

    @property
    def min_flush_ms(self) -> int:
        """Below this no request may ask its chunks to be sent."""
        return AWS_FLUSH_MS if self.profile == "aws" else 0

    def address(self) -> BrokerAddress:
        """The broker, with the password from its file or the environment."""
        return broker_address(
            self.mqtt,
            username=self.username,
            password=os.environ.get(PASSWORD_VARIABLE),
            password_file=self.password_file or None,
            ca_file=self.ca,
            cert_file=self.cert,
            key_file=self.key,
            protocol=self.protocol,
            keepalive_s=self.keepalive_s,
        )


def check_ranges(config: object, **ranges: tuple[float, float]) -> None:
    """Refuse a number of a configuration that is not within its range.

    Raises:
        InvalidRequest: naming the key.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {value}; it must be in [{low}, {high}]")


def from_mapping(
    given: Mapping[str, Any], source: str, kind: type[Any] = ServiceConfig
) -> dict[str, Any]:
    """The values of a mapping, each of the type of its field in `kind`.

    Raises:
        InvalidRequest: for a key that is not read or a value of another type.
    """
    types = {each.name: str(each.type) for each in fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in types:
            known = ", ".join(sorted(types))
            raise InvalidRequest(f"{source} sets {name!r}, which is not read; known: {known}")
        values[name] = _typed(name, value, types[name], source)
    return values


def _typed(name: str, value: Any, kind: str, source: str) -> Any:
    if value is None and kind.endswith("None"):
        return None
    if kind.startswith("tuple") and isinstance(value, list) and all(map(_is_text, value)):
        return tuple(value)
    if kind.startswith("str") and isinstance(value, str):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = {"s": "a string (quote it)", "t": "a list of strings", "i": "an integer"}
    raise InvalidRequest(
        f"{source} sets {name} to {value!r}; it must be {wanted.get(kind[0], 'a number')}"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def read_file(path: str | Path, kind: type[Any] = ServiceConfig) -> dict[str, Any]:
    """The values of a YAML file, each of the type of its field in `kind`.

    Raises:
        InvalidRequest: naming the key, or the line that is no YAML.
    """
    given = read_yaml(path, f"config {str(path)!r}", "; see docs/mqtt.md")
    return from_mapping(given, str(path), kind)


def read_yaml(path: str | Path, what: str, hint: str = "") -> dict[str, Any]:
    """The keys of a YAML file, which messages call `what`; `hint` says where keys are described.

    Raises:
        InvalidRequest: when it cannot be read, is no YAML, holds no keys, or one of them twice.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        """Refuses a key given twice, of which YAML would keep the last."""

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise InvalidRequest(f"{path} sets {sorted(twice)[0]!r} twice")
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as source:
            given = yaml.load(source, Strict)
    except OSError as error:
        raise InvalidRequest(f"{what} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{what} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"{what} holds no keys{hint}")
    return given


HELP = {
    "mqtt": "broker, as mqtt://host:1883 or mqtts://host:8883",
    "device_id": "name of this device in topics; equal to its certificate's common name",
    "prefix": "first levels of all topics",
    "pool": "also serve requests to this pool, shared with its other devices",
    "model": "name of the model in requests and answers (default: the bundle's)",
    "username": "user name at the broker",
    "password_file": f"file with the password; else ${PASSWORD_VARIABLE}",
    "ca": "certificates that vouch for the broker (default: the system's)",
    "cert": "client certificate",
    "key": "key of the client certificate",
    "protocol": "auto, 5 or 3.1.1",
    "profile": "lan, or aws for its 100 publishes a second",
    "flush_ms": "send tokens in batches of this many milliseconds",
    "state_dir": "folder for the boot counter",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`; each also is a key of the file."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with these and more keys")
    types = {each.name: str(each.type) for each in fields(ServiceConfig)}
    for name, text in HELP.items():
        kind = int if types[name] == "int" else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def from_options(options: argparse.Namespace) -> ServiceConfig:
    """The service that file and options ask for.

    Raises:
        InvalidRequest: naming the key.
    """
    return configured(ServiceConfig, options, HELP)


def configured(kind: type[T], options: argparse.Namespace, names: Iterable[str]) -> T:
    """A configuration of this kind, from the file of --config and the options of these names.

    Raises:
        InvalidRequest: naming the key.
    """
    values = read_file(options.config, kind) if options.config else {}
    for name in names:
        value = getattr(options, name)
        if value is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    for each in fields(kind):  # type: ignore[arg-type]
        if each.default is MISSING and each.name not in values:
            option = each.name.replace("_", "-")
            raise InvalidRequest(f"{each.name} is missing; give --{option} or the key in --config")
    return kind(**values)


def state_folder(config: ServiceConfig) -> Path:
    """Where the boot counter lives: given, systemd's StateDirectory, or the user's own."""
    if config.state_dir:
        return Path(config.state_dir)
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "edgecascade"
