# SPDX-License-Identifier: Apache-2.0
"""A wire between a client and a broker that can be cut."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from edgecascade.fleet.faults.wire import Wire


class Proxy(Wire):
    """TCP between a link and a broker; with `only_3` it answers MQTT 5 as an old broker would.

    `refusals`: what the first connections get instead of the broker, one each.
    """

    def __init__(
        self,
        target: int,
        *,
        only_3: bool = False,
        silent: bool = False,
        refusals: Iterable[bytes] = (),
    ) -> None:
        super().__init__(target)
        self.only_3, self.silent, self.closed = only_3, silent, False
        self._refusals = list(refusals)
        self.versions: list[int] = []

    def __enter__(self) -> Proxy:
        super().__enter__()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        return self

    def say(self, data: bytes) -> None:
        """Put a packet into the broker's mouth."""
        self._first.sendall(data)

    def serve(self, connection: socket.socket) -> None:
        """See Loopback."""
        if self.closed:
            return
        first = connection.recv(4096, socket.MSG_PEEK)
        version = first[first.index(b"MQTT") + 4]
        if not self.versions:
            self._first = connection
        self.versions.append(version)
        refusal = None
        if self._refusals:
            refusal = self._refusals.pop(0)
        elif version == 5 and self.only_3:
            # MQTT 3's "unacceptable protocol version"
            refusal = b"" if self.silent else b"\x20\x02\x00\x01"
        if refusal is None:
            super().serve(connection)
        else:
            connection.recv(4096)  # else the refusal is lost as the connection is reset
            connection.sendall(refusal)
