# SPDX-License-Identifier: Apache-2.0
"""What an agent is told: a YAML file, command line options, or both; options win."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgecascade.errors import InvalidRequest
from edgecascade.fleet.orders import is_mirror
from edgecascade.service.config import (
    BrokerAddress,
    ServiceConfig,
    check_ranges,
    configured,
    from_mapping,
    masked,
    read_file,
)
from edgecascade.service.topics import DEFAULT_PREFIX, is_name

SUFFIX = "-agent"  # the agent's own name: it has a certificate of its own
# What a release may not say of the service: who the device is, and whom it listens to.
_CONNECTION = (
    "mqtt", "prefix", "username", "password_file", "ca", "cert", "key", "protocol", "keepalive_s",
)  # fmt: skip
DEVICE_KEYS = frozenset(
    (*_CONNECTION, "device_id", "pool", "clients", "priority_clients", "state_dir")
)


@dataclass(frozen=True)
class AgentSettings:
    """All that an agent needs to know. Names are the YAML's keys.

    `repository` are addresses of the same repository, asked in order; `caches` are asked for blobs
    before the mirrors that an order names. `service` is the YAML file of `serve`; without one the
    service uses the agent's broker as `device_id`.
    """

    root: str
    device_id: str
    mqtt: str = ""  # none: updates only by `agent install`
    repository: tuple[str, ...] = ()
    trust: str | None = None  # root.json of the repository; needed once
    groups: tuple[str, ...] = ("all",)
    agent_id: str | None = None
    caches: tuple[str, ...] = ()
    redirects: tuple[str, ...] = ()
    service: str | None = None
    serve_options: tuple[str, ...] = ()
    prefix: str = DEFAULT_PREFIX
    username: str | None = None
    password_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    protocol: str = "auto"
    keepalive_s: int = 30
    session_expiry_s: int = 86_400
    refresh_s: float = 3600.0
    drain_s: float = 40.0

    def __post_init__(self) -> None:
        for name in (self.device_id, self.name, *self.groups):
            if not is_name(name):
                raise InvalidRequest(f"{name!r} is no name; give 1 to 64 of A-Z a-z 0-9 _ -")
        for cache in (*self.caches, *self.redirects):
            if "://" in cache and not is_mirror(cache):
                raise InvalidRequest(f"{masked(cache)!r} is no mirror; give http(s)://host/folder/")
        if self.cert is not None and self.service is None:
            raise InvalidRequest(
                f"the service needs a certificate of its own, for {self.device_id!r}; "
                "name its YAML file in `service`"
            )
        check_ranges(self, refresh_s=(1, 86_400), drain_s=(0, 3600))

    @property
    def name(self) -> str:
        """The agent's own identity at the broker."""
        return self.agent_id or f"{self.device_id}{SUFFIX}"

    @property
    def folder(self) -> Path:
        """The device's root."""
        return Path(self.root)

    def address(self) -> BrokerAddress:
        """The broker, as the agent."""
        same = {name: getattr(self, name) for name in _CONNECTION}
        return ServiceConfig(**same, device_id=self.name).address()

    def service_values(self, release_config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `serve`: the release's, below the device's own."""
        if self.service is not None:
            own = read_file(self.service)
        else:
            own = {name: getattr(self, name) for name in _CONNECTION}
        own.setdefault("device_id", self.device_id)
        own.setdefault("state_dir", str(self.folder / "service"))
        return {**release_config, **own}


def foreign_config(config: Mapping[str, Any]) -> str:
    """Why a release's configuration cannot be used here; empty if it can."""
    known = {field.name for field in fields(ServiceConfig)}
    wrong = sorted((config.keys() & DEVICE_KEYS) | (config.keys() - known))
    if wrong:
        return f"its configuration sets {', '.join(wrong)}, which no release may set"
    try:
        values = from_mapping(config, "its configuration")
        ServiceConfig(mqtt="mqtt://any", device_id="any", **values)
    except InvalidRequest as error:
        return str(error)
    return ""


HELP = {
    "root": "folder for bundles and state; this agent's alone",
    "mqtt": "broker, as mqtt://host:1883 or mqtts://host:8883",
    "device_id": "name of the device; the agent's own is DEVICE-agent",
    "repository": "the repository: http(s)://host/folder/, a folder, or mqtt: for the relay at the "
    "broker; repeatable",
    "trust": "root.json of the repository, when the device is set up",
    "groups": "group whose orders concern this device; repeatable (default: all)",
    "caches": "folder of blobs to ask first, such as a site's cache; repeatable",
    "service": "YAML file of serve",
    "ca": "certificates that vouch for the broker (default: the system's)",
    "cert": "client certificate of the agent",
    "key": "key of the client certificate",
    "prefix": "first levels of all topics",
}
SHORT = {"groups": "group", "caches": "cache"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the agent; each also is a key of the file."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with these and more keys")
    types = {field.name: str(field.type) for field in fields(AgentSettings)}
    for name, text in HELP.items():
        option = f"--{SHORT.get(name, name).replace('_', '-')}"
        action = "append" if types[name].startswith("tuple") else "store"
        parser.add_argument(option, dest=name, action=action, help=text)


def from_options(options: argparse.Namespace) -> AgentSettings:
    """The agent that file and options ask for.

    Raises:
        InvalidRequest: naming the key.
    """
    return configured(AgentSettings, options, HELP)
