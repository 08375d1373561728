# SPDX-License-Identifier: Apache-2.0
"""A server on loopback with a thread for each connection; all of them end with its `with` block."""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

Self = TypeVar("Self", bound="Loopback")


class Loopback(ABC):
    """What listens and ends; `serve` says what a connection gets."""

    port: int

    def __enter__(self: Self) -> Self:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._go(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        """End all connections now."""
        with self.lock:
            for each in self.connections:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Serve a connection to its end."""

    def _go(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with self.lock:
                    self.connections.add(connection)
                self._go(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                self.serve(connection)
        finally:
            with self.lock:
                self.connections.discard(connection)
