# SPDX-License-Identifier: Apache-2.0
"""A TCP wire that can be cut, slowed, delayed, or made deaf: open, and nothing comes through."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgecascade.fleet.faults.loopback import Loopback

BLOCK_BYTES = 4096
CONNECT_S = 5.0


@dataclass(frozen=True)
class Trouble:
    """What a wire does to the bytes. `after` of them pass before it begins."""

    kind: str = "none"  # none, cut, reset, deaf, delay, throttle
    after: int = 0
    delay_s: float = 0.0
    bytes_per_s: float = 0.0


class Wire(Loopback):
    """Between clients and a server on loopback, for the `with` block. `trouble` may be replaced."""

    def __init__(self, target: int) -> None:
        self.trouble = Trouble()
        self._target = target

    def serve(self, connection: socket.socket) -> None:
        """See Loopback."""
        with socket.create_connection(("127.0.0.1", self._target), CONNECT_S) as far:
            far.settimeout(None)
            with self.lock:
                self.connections.add(far)
            try:
                back = threading.Thread(target=self._copy, args=(far, connection), daemon=True)
                back.start()
                self._copy(connection, far)
                back.join()
            finally:
                with self.lock:
                    self.connections.discard(far)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(BLOCK_BYTES):
                trouble = self.trouble
                if trouble.kind != "none" and passed + len(data) > trouble.after:
                    if not self._suffer(trouble, source, sink, data, passed):
                        return
                else:
                    sink.sendall(data)
                passed += len(data)
            sink.shutdown(socket.SHUT_RDWR)

    def _suffer(
        self, trouble: Trouble, source: socket.socket, sink: socket.socket, data: bytes, passed: int
    ) -> bool:
        """Whether the connection goes on."""
        if trouble.kind in ("cut", "reset"):
            sink.sendall(data[: max(0, trouble.after - passed)])
            if trouble.kind == "reset":
                for each in (source, sink):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            return False
        if trouble.kind == "deaf":
            while self.trouble is trouble and not self.closing.wait(0.05):
                pass
            return False  # what was swallowed is lost, and so is the stream
        if trouble.kind == "delay":
            self.closing.wait(trouble.delay_s)
        elif trouble.kind == "throttle":
            self.closing.wait(len(data) / trouble.bytes_per_s)
        sink.sendall(data)
        return True


def any_trouble(rng: random.Random, kind: str, size: int) -> Trouble:
    """A trouble of a kind, somewhere within so many bytes."""
    return Trouble(
        kind,
        after=rng.randrange(max(1, size)),
        delay_s=rng.uniform(0.01, 0.1),
        bytes_per_s=rng.uniform(50_000, 500_000),
    )


def until(test: Callable[[], bool], timeout_s: float) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + timeout_s
    while not test():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
