# SPDX-License-Identifier: Apache-2.0
"""The topic tree, both ways. The sender is a level of every topic, so a broker's ACL can prove it.

<prefix>/d/<device>/status | info | telemetry                   device -> all
<prefix>/d/<device>/chat/<client>, .../cancel/<client>          client -> device
<prefix>/pool/<pool>/chat/<client>                              client -> any device of the pool
<prefix>/c/<client>/r/<device>/<request>                        device -> client
<prefix>/c/<client>/status                                      client -> devices
<prefix>/g/<group>/announce                                     operator -> agents
<prefix>/d/<agent>/cmd/<op>                                     operator -> agent
<prefix>/d/<agent>/jobs/<order>, <prefix>/d/<agent>/standing    agent -> operator
<prefix>/repo/get/<agent>, <prefix>/repo/rx/<agent>             agent <-> repository

An agent updates a device; it has an identity of its own, and is a device in this tree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgecascade.errors import InvalidRequest

DEFAULT_PREFIX = "edgecascade/v1"
NO_ID = "_"  # the reply id of a request whose own id cannot be read

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REQUEST = re.compile(r"[A-Za-z0-9_-]{8,64}")
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+){0,3}")

Kind = Literal[
    "chat", "pool", "cancel", "client-status", "status", "info", "telemetry", "reply",
    "announce", "command", "job", "standing", "repo-get", "repo-rx",
]  # fmt: skip


@dataclass(frozen=True)
class Address:
    """What a topic says: the kind of message, and whom it names."""

    kind: Kind
    device: str = ""
    client: str = ""
    pool: str = ""
    request: str = ""
    group: str = ""
    order: str = ""
    op: str = ""


@dataclass(frozen=True)
class Topics:
    """Names of topics under one prefix."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise InvalidRequest(
                f"topic prefix is {self.prefix!r}; it must be one to four levels of letters, "
                "digits, - and _, as in edgecascade/v1"
            )

    def status(self, device: str) -> str:
        """Retained state of a device, and its last will."""
        return f"{self.prefix}/d/{device}/status"

    def info(self, device: str) -> str:
        """Retained description of a device."""
        return f"{self.prefix}/d/{device}/info"

    def telemetry(self, device: str) -> str:
        """Measurements of a device."""
        return f"{self.prefix}/d/{device}/telemetry"

    def chat(self, device: str, client: str) -> str:
        """Requests of a client to a device; "+" for all."""
        return f"{self.prefix}/d/{device}/chat/{client}"

    def cancel(self, device: str, client: str) -> str:
        """Cancellations of a client to a device; "+" for all."""
        return f"{self.prefix}/d/{device}/cancel/{client}"

    def pool_chat(self, pool: str, client: str) -> str:
        """Requests of a client to any device of a pool; "+" for all."""
        return f"{self.prefix}/pool/{pool}/chat/{client}"

    def reply(self, client: str, device: str, request: str) -> str:
        """Answers of a device to a request; "+" for all."""
        return f"{self.prefix}/c/{client}/r/{device}/{request}"

    def client_status(self, client: str) -> str:
        """Last will of a client; "+" for all."""
        return f"{self.prefix}/c/{client}/status"

    def announce(self, group: str) -> str:
        """Retained order to a group of devices; "+" for all groups."""
        return f"{self.prefix}/g/{group}/announce"

    def command(self, agent: str, op: str) -> str:
        """Order to one device; "+" for all kinds."""
        return f"{self.prefix}/d/{agent}/cmd/{op}"

    def job(self, agent: str, order: str) -> str:
        """Retained report of a device about an order; "+" for all."""
        return f"{self.prefix}/d/{agent}/jobs/{order}"

    def standing(self, agent: str) -> str:
        """Retained word of a device on how it stands; "+" for all."""
        return f"{self.prefix}/d/{agent}/standing"

    def repo_get(self, agent: str) -> str:
        """Questions of an agent for small files; "+" for all agents."""
        return f"{self.prefix}/repo/get/{agent}"

    def repo_rx(self, agent: str) -> str:
        """Blocks of the files that an agent asked for."""
        return f"{self.prefix}/repo/rx/{agent}"

    def agent_filters(self, agent: str, groups: Sequence[str]) -> tuple[str, ...]:
        """What an agent subscribes to."""
        orders = tuple(self.announce(group) for group in groups)
        return (*orders, self.command(agent, "+"), self.repo_rx(agent))

    def device_filters(self, device: str, pool: str | None) -> tuple[str, ...]:
        """What a device subscribes to."""
        own = (self.chat(device, "+"), self.cancel(device, "+"), self.client_status("+"))
        return (*own, f"$share/{pool}/{self.pool_chat(pool, '+')}") if pool else own

    def client_filters(self, client: str) -> tuple[str, ...]:
        """What a client subscribes to."""
        return (self.reply(client, "+", "+"), self.status("+"))

    def parse(self, topic: str) -> Address | None:
        """What a topic of this tree says; None for any other."""
        if not topic.startswith(f"{self.prefix}/"):
            return None
        levels = topic[len(self.prefix) + 1 :].split("/")
        if not all(_NAME.fullmatch(level) for level in levels):
            return None
        match levels:
            case ["d", device, "chat", client]:
                return Address("chat", device=device, client=client)
            case ["d", device, "cancel", client]:
                return Address("cancel", device=device, client=client)
            case ["d", device, ("status" | "info" | "telemetry") as kind]:
                return Address(kind, device=device)
            case ["pool", pool, "chat", client]:
                return Address("pool", pool=pool, client=client)
            case ["g", group, "announce"]:
                return Address("announce", group=group)
            case ["d", agent, "cmd", op]:
                return Address("command", device=agent, op=op)
            case ["d", agent, "jobs", order]:
                return Address("job", device=agent, order=order)
            case ["d", agent, "standing"]:
                return Address("standing", device=agent)
            case ["repo", "get", agent]:
                return Address("repo-get", device=agent)
            case ["repo", "rx", agent]:
                return Address("repo-rx", device=agent)
            case ["c", client, "status"]:
                return Address("client-status", client=client)
            case ["c", client, "r", device, request]:
                return Address("reply", device=device, client=client, request=request)
        return None

    def allows_reply(self, topic: str, client: str) -> bool:
        """Whether a response topic that a client names is its own to read.

        A device may publish there, so a topic elsewhere would let any client speak as the device.
        """
        own = f"{self.prefix}/c/{client}/"
        rest = topic[len(own) :].split("/")
        return (
            topic.startswith(own)
            and rest != ["status"]
            and len(rest) <= 4
            and all(_NAME.fullmatch(level) for level in rest)
        )


def is_name(text: object) -> bool:
    """Whether this can be a device, client or pool in a topic."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_request_id(text: object) -> bool:
    """Whether this can be a request's id: long enough not to be met by chance."""
    return isinstance(text, str) and _REQUEST.fullmatch(text) is not None
