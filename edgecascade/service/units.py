# SPDX-License-Identifier: Apache-2.0
"""systemd: the unit file, and the two words a service says to it (sd_notify)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import PurePosixPath

from edgecascade.errors import InvalidRequest

# Half of this passes between two signs of life, so one may be late.
WATCHDOG_S = 30

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}")

_UNIT = """\
[Unit]
Description={description}
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# Ready means: {ready}.
TimeoutStartSec=infinity
WatchdogSec={watchdog_s}
Restart=always
RestartSec=2
# SIGTERM drains: what runs is finished, what comes is sent elsewhere.
TimeoutStopSec={stop_s}
{kill}User={user}
StateDirectory=edgecascade
CacheDirectory=edgecascade
Environment=XDG_CACHE_HOME=/var/cache/edgecascade
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
# Not PrivateDevices, ProtectClock or DeviceAllow: they hide the GPU.
# Not MemoryDenyWriteExecute: CUDA and TensorRT compile.

[Install]
WantedBy=multi-user.target
"""


def unit(bundle: str, config: str, *, program: str, user: str = "edgecascade") -> str:
    """A unit that starts when the service is ready to answer, and again when it hangs.

    Raises:
        InvalidRequest: for a path or a user that systemd would read otherwise.
    """
    _check(user, bundle, config, program)
    return _UNIT.format(
        description="EdgeCascade language model over MQTT",
        command=f"{program} serve {bundle} --config {config}",
        ready="the bundle is loaded and the broker has accepted the connection",
        watchdog_s=WATCHDOG_S,
        stop_s=60,
        user=user,
        kill="",
    )


def agent_unit(config: str, *, program: str, user: str = "edgecascade") -> str:
    """A unit for the agent, which starts the service itself and ends it when it ends.

    Raises:
        InvalidRequest: for a path or a user that systemd would read otherwise.
    """
    _check(user, config, program)
    return _UNIT.format(
        description="EdgeCascade agent: updates the model and keeps it served",
        command=f"{program} agent --config {config}",
        ready="the state is read; the service may still be loading",
        watchdog_s=WATCHDOG_S,
        stop_s=120,
        user=user,
        kill="# The agent lets its service drain; both are killed when that takes too long.\n"
        "KillMode=mixed\n",
    )


def _check(user: str, *paths: str) -> None:
    if not _USER.fullmatch(user):  # an empty one would be root
        raise InvalidRequest(
            f"user is {user!r}; give a name of letters, digits, _ - and . or a number"
        )
    for path in paths:
        if not PurePosixPath(path).is_absolute() or set(path) & set(" \t\n\"'\\%$"):
            raise InvalidRequest(
                f"path is {path!r}; a unit needs an absolute one without spaces, quotes, % or $"
            )


def notify(words: str) -> bool:
    """Tell systemd, as READY=1 or WATCHDOG=1; False where nobody listens, or not just now."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    path = "\0" + address[1:] if address.startswith("@") else address
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
    ):
        out.setblocking(False)  # a listener that is stuck must not hold the service
        out.sendto(words.encode(), path)
        return True
    return False


def watchdog_period_s() -> float | None:
    """How often systemd wants a sign of life: half of its patience."""
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2e6
    except (KeyError, ValueError):
        return None
