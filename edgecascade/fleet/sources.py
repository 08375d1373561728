# SPDX-License-Identifier: Apache-2.0
"""Where files of a bundle come from: an HTTP(S) server or a folder. None of them is trusted.

A source gives bytes from an offset on; what they are worth is decided by the size and the hash that
somebody signed. Nothing here writes a file.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

from edgecascade.errors import InvalidRequest
from edgecascade.files import open_regular
from edgecascade.service.config import masked

BLOCK_BYTES = 1 << 18
MAX_REDIRECTS = 3
LONGEST_WAIT_S = 60.0  # a server's Retry-After is believed up to here
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_LASTING = {401: "refused", 403: "refused", 404: "absent", 410: "absent"}


class SourceFault(Exception):
    """A source did not give what was asked for.

    `reason` is a stable word; `lasting`: asking this source again for this file would not help.
    """

    def __init__(
        self, reason: str, message: str, *, lasting: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting
        self.wait_s = wait_s


@dataclass(frozen=True)
class Patience:
    """How long a source may take."""

    connect_s: float = 10.0
    head_s: float = 20.0  # from the question to the end of the answer's head
    read_s: float = 30.0  # between two bytes
    min_bytes_per_s: float = 1024.0
    window_s: float = 30.0  # over which that is measured


@dataclass(eq=False)
class Body:
    """An answer that is being read. `start` is 0 where the source begins anew.

    `read` gives at most that many bytes, none at the end; `abort` may be called from any thread.
    """

    start: int
    read: Callable[[int], bytes]
    abort: Callable[[], None]
    close: Callable[[], None]
    etag: str | None = None
    length: int | None = None  # how many bytes are to come, where that was said


class Source(Protocol):
    """Something that has files."""

    @property
    def name(self) -> str:
        """For reports and logs; without secrets."""

    def open(self, path: str, start: int, size: int | None, etag: str | None) -> Body:
        """A file from a byte on.

        `size` is what it must have in all, if that is known; `etag` the mark that the bytes before
        `start` had.

        Raises:
            SourceFault: for anything but the file.
        """


class FolderSource:
    """A folder: a USB stick, a mounted share."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.name = str(folder)

    def open(self, path: str, start: int, size: int | None, etag: str | None) -> Body:
        """See Source."""
        checked_path(path)
        try:
            file = open_regular(self._folder / path)
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            raise SourceFault(
                "absent" if absent else "unreachable", f"{path}: {error.strerror}", lasting=absent
            ) from error
        length = os.fstat(file.fileno()).st_size
        if size not in (None, length):
            file.close()
            raise SourceFault("wrong-size", f"{length} bytes instead of {size}", lasting=True)
        if start > length:
            start = 0
        file.seek(start)

        def read(limit: int) -> bytes:
            try:
                return file.read(limit)
            except OSError as error:  # a stick that was pulled out
                raise SourceFault("unreachable", f"{path}: {error.strerror}") from error

        return Body(start, read, abort=lambda: None, close=file.close, length=length - start)


@dataclass(frozen=True)
class Origin:
    """Who answers a URL."""

    scheme: str
    host: str
    port: int


@dataclass
class HttpSource:
    """A static server. Redirects lead only to its own origin and to `redirects`."""

    url: str
    patience: Patience = Patience()
    redirects: frozenset[Origin] = frozenset()
    tls: ssl.SSLContext | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = self.url if self.url.endswith("/") else self.url + "/"
        self.origin = origin_of(self.url)
        self.name = self.url
        if self.tls is None and self.origin.scheme == "https":
            self.tls = ssl.create_default_context()

    def open(self, path: str, start: int, size: int | None, etag: str | None) -> Body:
        """See Source."""
        checked_path(path)
        url = urljoin(self.url, quote(path))
        for _ in range(MAX_REDIRECTS + 1):
            with contextlib.ExitStack() as closing:
                call = _Call(url, self.patience, self.tls)
                closing.callback(call.close)
                try:
                    answer = call.ask(start, etag)
                    where = answer.getheader("Location")
                    if answer.status in (301, 302, 303, 307, 308) and where:
                        url = self._redirected(url, where)
                        continue
                    body = _body(call, answer, start, size, etag)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    said = str(error) or type(error).__name__
                    raise SourceFault("unreachable", f"{url}: {said}") from error
                closing.pop_all()  # the body closes it
                return body
        raise SourceFault("redirected", f"{path} is redirected in a circle", lasting=True)

    def _redirected(self, url: str, where: str) -> str:
        target = urljoin(url, where)
        try:
            known = origin_of(target) in self.redirects | {self.origin}
        except InvalidRequest:
            known = False
        if not known:
            raise SourceFault(
                "redirected", f"{url} redirects to {target[:200]!r}, which is not listed",
                lasting=True,
            )  # fmt: skip
        return target


class _Call:
    """One HTTP request on its own connection, which can be cut from another thread."""

    def __init__(self, url: str, patience: Patience, tls: ssl.SSLContext | None) -> None:
        self._patience, self._tls = patience, tls
        self._origin = origin_of(url)
        parts = urlsplit(url)
        self._target = parts.path + (f"?{parts.query}" if parts.query else "")
        self._socket: socket.socket | None = None
        self._answer: http.client.HTTPResponse | None = None

    def ask(self, start: int, etag: str | None) -> http.client.HTTPResponse:
        """The answer's head. A server that sends it byte by byte is cut off in time."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "edgecascade"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag is not None:
                headers["If-Range"] = etag
        connection = http.client.HTTPConnection(self._origin.host, self._origin.port)
        raw = socket.create_connection(
            (self._origin.host, self._origin.port), self._patience.connect_s
        )
        raw.settimeout(self._patience.read_s)
        self._socket = raw
        if self._tls is not None and self._origin.scheme == "https":
            self._socket = self._tls.wrap_socket(
                raw, server_hostname=self._origin.host, do_handshake_on_connect=False
            )
        watch = threading.Timer(self._patience.head_s, self.abort)
        watch.daemon = True
        watch.start()
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                self._socket.do_handshake()
            connection.sock = self._socket
            connection.request("GET", self._target, headers=headers)
            self._answer = connection.getresponse()
        finally:
            watch.cancel()
        return self._answer

    def abort(self) -> None:
        """Make whoever reads stop."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection up."""
        if self._answer is not None:
            self._answer.close()
        if self._socket is not None:
            self._socket.close()


def _body(
    call: _Call, answer: http.client.HTTPResponse, start: int, size: int | None, etag: str | None
) -> Body:
    begin = _checked_head(answer, start, size, etag)

    def read(limit: int) -> bytes:
        try:
            return answer.read1(limit)
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = str(error) or type(error).__name__
            raise SourceFault("unreachable", f"cut off: {said}") from error

    mark = answer.getheader("ETag")
    # A weak mark does not promise the same bytes.
    strong = mark if mark and mark.startswith('"') and len(mark) < 200 else None
    length = answer.getheader("Content-Length")
    return Body(begin, read, call.abort, call.close, strong, int(length) if length else None)


def _checked_head(
    answer: http.client.HTTPResponse, start: int, size: int | None, etag: str | None
) -> int:
    """The offset at which the answer begins: what was asked for, or 0."""
    status = answer.status
    if status not in (200, 206):
        raise _status_fault(answer)
    if (coding := answer.getheader("Content-Encoding", "identity")) != "identity":
        raise SourceFault("wrong-answer", f"the answer is encoded as {coding!r}", lasting=True)
    length = answer.getheader("Content-Length")
    if length is not None and not re.fullmatch(r"\d{1,19}", length):
        raise SourceFault("wrong-answer", f"Content-Length is {length!r}", lasting=True)
    if status == 200:
        if size is not None and length is not None and int(length) != size:
            raise SourceFault("wrong-size", f"{length} bytes instead of {size}", lasting=True)
        return 0
    given = answer.getheader("Content-Range", "")
    match = _RANGE.fullmatch(given)
    if start == 0 or match is None or int(match[1]) != start or int(match[2]) < start:
        raise SourceFault(
            "wrong-range", f"Content-Range is {given!r}, asked was bytes {start}-", lasting=True
        )
    if size is not None and (match[3] not in ("*", str(size)) or int(match[2]) >= size):
        raise SourceFault("wrong-size", f"{given!r} instead of {size} bytes", lasting=True)
    if length is not None and int(length) != int(match[2]) - start + 1:
        raise SourceFault("wrong-range", f"{length} bytes as {given!r}", lasting=True)
    if etag is not None and answer.getheader("ETag", etag) != etag:
        raise SourceFault("changed", "the file changed while it was fetched")
    return start


def _status_fault(answer: http.client.HTTPResponse) -> SourceFault:
    status = answer.status
    if status == 416:
        return SourceFault("changed", "the server has no such range")
    text = f"status {status} {answer.reason[:60]}"
    if status in _LASTING:
        return SourceFault(_LASTING[status], text, lasting=True)
    if status == 429 or status >= 500:
        after = answer.getheader("Retry-After", "")
        wait_s = min(LONGEST_WAIT_S, float(after)) if after.isdigit() else 0.0
        return SourceFault("busy", text, wait_s=wait_s)
    return SourceFault("wrong-answer", text, lasting=True)


def source_of(
    where: str,
    *,
    patience: Patience = Patience(),
    redirects: Sequence[str] = (),
    tls: ssl.SSLContext | None = None,
) -> Source:
    """The source that an address names: http://, https://, file:// or a folder.

    Raises:
        InvalidRequest: for any other.
    """
    scheme = urlsplit(where).scheme
    if scheme in ("http", "https"):
        return HttpSource(where, patience, frozenset(map(origin_of, redirects)), tls)
    if scheme == "file":
        return FolderSource(unquote(urlsplit(where).path))
    if scheme:
        raise InvalidRequest(f"source is {masked(where)!r}; give http://, https:// or a folder")
    return FolderSource(where)


def origin_of(url: str) -> Origin:
    """Scheme, host and port of a URL.

    Raises:
        InvalidRequest: for what is no http or https URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as error:
        raise InvalidRequest(f"{masked(url)[:200]!r} is no http or https address") from error
    if not parts.hostname or parts.username is not None:
        raise InvalidRequest(f"{masked(url)[:200]!r} must name a host, and no user")
    return Origin(parts.scheme, parts.hostname, port)


def checked_path(path: str) -> str:
    """A path below the source's own folder, and nothing else.

    Raises:
        SourceFault: for any other.
    """
    parts = path.split("/")
    if not path or path.startswith("/") or {"", ".", ".."} & set(parts) or "\0" in path:
        raise SourceFault("wrong-path", f"{path!r} is no path below a folder", lasting=True)
    return path


def blocks(body: Body, patience: Patience) -> Iterator[bytes]:
    """What a source gives, block by block; a source that is too slow is left.

    Only the time spent waiting for the source counts, so a rate limit of ours does not.
    """
    waited, got, left = 0.0, 0, body.length
    while True:
        before = time.monotonic()
        block = body.read(BLOCK_BYTES)
        waited += time.monotonic() - before
        got += len(block)
        left = None if left is None else left - len(block)
        if not block:
            if left:
                raise SourceFault("unreachable", f"cut off {left} bytes before the end")
            return
        yield block
        if waited >= patience.window_s:
            if got < patience.min_bytes_per_s * waited:
                raise SourceFault("slow", f"{got / waited:.0f} bytes/s for {waited:.0f} s")
            waited, got = 0.0, 0


def read_file(source: Source, path: str, limit: int, patience: Patience) -> bytes:
    """The first `limit` bytes of a small file of unknown size.

    Raises:
        SourceFault: when the source does not give it.
    """
    body = source.open(path, 0, None, None)
    data = bytearray()
    try:
        for block in blocks(body, patience):
            data += block
            if len(data) >= limit:
                break
    finally:
        body.close()
    return bytes(data[:limit])
