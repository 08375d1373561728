# SPDX-License-Identifier: Apache-2.0
"""Messages that wait to be read, client by client in turn: who floods waits for itself alone."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque

from edgecascade.service.protocol import Incoming

MAX_WAITING, MAX_BYTES = 4096, 64 << 20
MAX_OF_ONE, MAX_BYTES_OF_ONE = 1024, 16 << 20

Arrived = tuple[Incoming, float]  # and the time when it came


class Inbox:
    """Filled on one thread and emptied on another; bounded, in all and for each client."""

    def __init__(self) -> None:
        self.lost = 0
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, deque[Arrived]] = OrderedDict()
        self._waiting = 0
        self._bytes: Counter[str] = Counter()  # by client

    def __len__(self) -> int:
        return self._waiting

    def put(self, message: Incoming, now: float) -> None:
        """Keep a message, or count it as lost: a client's retry must do."""
        client, size = _sender(message.topic), _size(message)
        with self._lock:
            line = self._lines.get(client, ())
            one = len(line) >= MAX_OF_ONE or self._bytes[client] + size > MAX_BYTES_OF_ONE
            if one or self._waiting >= MAX_WAITING or self._bytes.total() + size > MAX_BYTES:
                self.lost += 1
                return
            self._lines.setdefault(client, deque()).append((message, now))
            self._waiting += 1
            self._bytes[client] += size

    def take(self) -> Arrived | None:
        """The oldest message of the client whose turn it is."""
        with self._lock:
            if not self._lines:
                return None
            client, line = self._lines.popitem(last=False)
            arrived = line.popleft()
            self._bytes[client] -= _size(arrived[0])
            if line:
                self._lines[client] = line
            else:
                del self._bytes[client]
            self._waiting -= 1
            return arrived


def _size(message: Incoming) -> int:
    return len(message.payload) + len(message.correlation or b"")


def _sender(topic: str) -> str:
    """The client that a topic of topics.py names; other topics are no messages of ours."""
    *_, group, client, last = ("", "", *topic.split("/"))
    return client if (group, last) == ("c", "status") else last
