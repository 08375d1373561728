# SPDX-License-Identifier: Apache-2.0
"""A wire between a client and a broker that can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable

from edgecascade.service.broker import free_port


class Proxy:
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
        self.target, self.only_3, self.silent, self.closed = target, only_3, silent, False
        self._refusals = list(refusals)
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.versions: list[int] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._go(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def say(self, data: bytes) -> None:
        """Put a packet into the broker's mouth."""
        self._sockets[0].sendall(data)

    def _go(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                if self.closed:
                    near.close()
                    continue
                self._go(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            first = near.recv(4096)
            version = first[first.index(b"MQTT") + 4]
            self.versions.append(version)
            if self._refusals:
                near.sendall(self._refusals.pop(0))
                return
            if version == 5 and self.only_3:
                if not self.silent:
                    near.sendall(b"\x20\x02\x00\x01")  # MQTT 3's "unacceptable protocol version"
                return
            with socket.create_connection(("127.0.0.1", self.target)) as far:
                self._sockets.append(far)
                far.sendall(first)
                self._go(self._copy, far, near)
                self._copy(near, far)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
