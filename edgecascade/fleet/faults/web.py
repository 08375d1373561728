# SPDX-License-Identifier: Apache-2.0
"""A static web server on loopback that answers rightly, or wrongly in every way we know.

It speaks HTTP/1.1 on plain sockets, since no library would send what the faults need.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgecascade.fleet.faults.loopback import Loopback

MAX_HEAD_BYTES = 16 << 10
STALL_S = 20.0  # longer than any patience of a test
DRIP_S = 0.05

_REQUEST = re.compile(rb"GET (\S+) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"(?i)\r\nrange: bytes=(\d+)-\r\n")
_IF_RANGE = re.compile(rb"(?i)\r\nif-range: ([^\r]+)\r\n")


@dataclass(frozen=True)
class Request:
    """What a client asked for, and which of its questions for this file it is."""

    path: str
    data: bytes
    start: int | None
    if_range: str | None
    number: int
    head: bytes = b""


@dataclass
class Answer:
    """A connection that an answer is written to."""

    connection: socket.socket
    closing: threading.Event
    sent: int = 0  # bytes of files, not of heads

    def write(self, head: str = "", body: bytes = b"") -> None:
        """Send a head, CRLF for each line, and a body."""
        if head:
            self.connection.sendall(head.replace("\n", "\r\n").encode("latin-1"))
        if body:
            self.connection.sendall(body)
            self.sent += len(body)

    def reset(self) -> None:
        """Close as a crash does: without the end of the stream."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def sleep(self, seconds: float) -> None:
        """Keep the client waiting, unless the server is closed."""
        self.closing.wait(seconds)


Fault = Callable[[Request, Answer], None]


@dataclass
class Site(Loopback):
    """A server for the `with` block. `fault(request)` may name what goes wrong this time."""

    files: Mapping[str, bytes]
    fault: Callable[[Request], Fault | None] = lambda request: None
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> Site:
        super().__enter__()
        self.url = f"http://127.0.0.1:{self.port}/"
        return self

    def serve(self, connection: socket.socket) -> None:
        """See Loopback."""
        answer = Answer(connection, self.closing)
        path = ""
        try:
            connection.settimeout(STALL_S)
            request = self._read(connection)
            if request is not None:
                path = request.path
                (self.fault(request) or serve)(request, answer)
        finally:
            with self.lock:
                self.sent[path] += answer.sent

    def _read(self, connection: socket.socket) -> Request | None:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
            if not (more := connection.recv(4096)):
                return None
            head += more
        asked, ranged, mark = _REQUEST.match(head), _RANGE.search(head), _IF_RANGE.search(head)
        if asked is None:
            return None
        path = asked[1].decode().lstrip("/")
        with self.lock:
            number = self.asked[path]
            self.asked[path] += 1
            request = Request(
                path,
                self.files.get(path, b""),
                int(ranged[1]) if ranged else None,
                mark[1].decode() if mark else None,
                number,
                head,
            )
            self.log.append(request)
        if path not in self.files:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return None
        return request


def etag_of(data: bytes) -> str:
    """The mark of a file."""
    return f'"{len(data)}-{hash(data) & 0xFFFFFFFF:08x}"'


def head_of(request: Request, *, etag: str | None = None, extra: str = "") -> tuple[str, bytes]:
    """The right answer: its head, and its body."""
    data, start = request.data, request.start
    mark = etag or etag_of(data)
    fresh = request.if_range not in (None, mark)
    common = f"ETag: {mark}\nAccept-Ranges: bytes\n{extra}Connection: close\n\n"
    if start is None or fresh:
        return f"HTTP/1.1 200 OK\nContent-Length: {len(data)}\n{common}", data
    if start >= len(data):
        return f"HTTP/1.1 416 Range Not Satisfiable\nContent-Length: 0\n{common}", b""
    where = f"bytes {start}-{len(data) - 1}/{len(data)}"
    length = len(data) - start
    head = f"HTTP/1.1 206 Partial Content\nContent-Length: {length}\nContent-Range: {where}\n"
    return head + common, data[start:]


def serve(request: Request, answer: Answer) -> None:
    """Answer rightly."""
    answer.write(*head_of(request))


def drip(request: Request, answer: Answer, *, head: bool) -> None:
    """A byte now and then."""
    text, body = head_of(request)
    if not head:
        answer.write(text)
    end = time.monotonic() + STALL_S
    raw = text.replace("\n", "\r\n").encode() if head else body
    for at in range(len(raw)):
        if time.monotonic() > end or answer.closing.is_set():
            return
        answer.write(body=raw[at : at + 1])
        answer.sleep(DRIP_S)
