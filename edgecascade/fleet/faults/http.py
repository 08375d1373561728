# SPDX-License-Identifier: Apache-2.0
"""Downloads from servers that cut, lie, stall and never end.

Whatever the first mirror does: a good one behind it gives the bundle; without one the download ends
in time and says what the mirror did; and no file ever has more bytes than were signed, or is kept
with another hash.
"""

from __future__ import annotations

import functools
import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgecascade.errors import DownloadFailed
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.web import Answer, Fault, Request, Site, drip, head_of, serve
from edgecascade.fleet.fetch import Blob, Downloader, Pace
from edgecascade.fleet.sources import BLOCK_BYTES, HttpSource, Patience

TITLE = "downloads from servers that cut, lie, stall and never end"
FULL = 250
SHORT = 30

PATIENCE = Patience(connect_s=2, head_s=0.3, read_s=0.3, min_bytes_per_s=4096, window_s=0.2)
PACE = Pace(parallel=2, rounds=3, pause_s=0.01, longest_pause_s=0.02)
BOUND_S = 20.0  # for one case, on a busy machine
SIZE = 2 * BLOCK_BYTES + 1000


@dataclass(frozen=True)
class Lie:
    """A way to answer wrongly. `helps`: a blob can be had from it, though not at once."""

    name: str
    tell: Fault
    helps: bool = False


def _cut(at: int, how: str) -> Fault:
    def tell(request: Request, answer: Answer) -> None:
        text, body = head_of(request)
        answer.write(text, body[:at])
        if how == "reset":
            answer.reset()
        elif how == "stall":
            answer.sleep(5)

    return tell


def _head(change: Callable[[Request], str], *, body: bool = True) -> Fault:
    def tell(request: Request, answer: Answer) -> None:
        answer.write(change(request), request.data[request.start or 0 :] if body else b"")

    return tell


def _extra(line: str) -> Fault:
    return lambda request, answer: answer.write(*head_of(request, extra=line + "\n"))


def _status(status: str, line: str = "") -> Fault:
    text = f"HTTP/1.1 {status}\nContent-Length: 0\n{line}\n"
    return lambda request, answer: answer.write(text)


def _only_200(request: Request, answer: Answer) -> None:
    serve(replace(request, start=None), answer)


def _range_is(where: str) -> Fault:
    """A 206 with another Content-Range."""

    def change(request: Request) -> str:
        start, size = request.start or 0, len(request.data)
        given = where.format(start=start, end=size - 1, size=size, other=start + 7)
        return f"HTTP/1.1 206 Partial Content\n{given}\n"

    return _head(change)


def _length_is(length: str) -> Fault:
    return _head(
        lambda request: f"HTTP/1.1 200 OK\nContent-Length: {length}\n\n".format(
            size=len(request.data), more=len(request.data) + 1, less=len(request.data) - 1
        )
    )


def _endless(request: Request, answer: Answer) -> None:
    answer.write("HTTP/1.1 200 OK\n\n", request.data)
    for _ in range(4000):
        answer.write(body=bytes(64 << 10))


def _endless_chunks(request: Request, answer: Answer) -> None:
    answer.write("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n")
    for _ in range(4000):
        answer.write("10000\n", bytes(1 << 16))
        answer.write("\n")


def _endless_head(request: Request, answer: Answer) -> None:
    answer.write("HTTP/1.1 200 OK\n")
    for index in range(100_000):
        answer.write(f"X-{index}: {'y' * 100}\n")


def _continues(request: Request, answer: Answer) -> None:
    for _ in range(2000):
        answer.write("HTTP/1.1 100 Continue\n\n")
        answer.sleep(0.001)


def _changes(request: Request, answer: Answer) -> None:
    """Another mark at each question, and a cut half-way."""
    text, body = head_of(request, etag=f'"mark-{request.number}"')
    answer.write(text, body[: len(body) // 2])


def _mixed(request: Request, answer: Answer) -> None:
    """Gives a range although the mark is another one's."""
    text, body = head_of(replace(request, if_range=None), etag=f'"mark-{request.number}"')
    answer.write(text, body[: 3 * len(body) // 4])


def _flipped(request: Request, answer: Answer) -> None:
    text, body = head_of(request)
    wrong = bytearray(body)
    wrong[len(wrong) // 3] ^= 1
    answer.write(text, bytes(wrong))


def _loop(request: Request, answer: Answer) -> None:
    answer.write(f"HTTP/1.1 302 Found\nLocation: /{request.path}\nContent-Length: 0\n\n")


CUTS = (0, 1, *(edge + d for edge in (BLOCK_BYTES, 2 * BLOCK_BYTES) for d in (-1, 0, 1)), SIZE - 1)
LIES_TOLD: tuple[Lie, ...] = (
    *(
        Lie(f"{how}-at-{at}", _cut(at, how), helps=at >= 64 << 10)
        for how in ("cut", "reset", "stall")
        for at in CUTS
    ),
    Lie("200-for-206", _only_200, helps=True),
    Lie("range-shifted", _range_is("Content-Range: bytes {other}-{end}/{size}\n")),
    Lie("range-of-another-size", _range_is("Content-Range: bytes {start}-{end}/999\n")),
    Lie("range-beyond", _range_is("Content-Range: bytes {start}-{size}/*\n")),
    Lie("range-in-lines", _range_is("Content-Range: lines {start}-{end}/{size}\n")),
    Lie("range-missing", _range_is("X: y\n")),
    Lie("ranges-multipart", _range_is("Content-Type: multipart/byteranges; boundary=x\n")),
    Lie("etag-changes", _changes),
    Lie("etag-ignored", _mixed),
    Lie("gzip", _extra("Content-Encoding: gzip")),
    Lie("length-more", _length_is("{more}")),
    Lie("length-less", _length_is("{less}")),
    Lie("length-negative", _length_is("-1")),
    Lie("length-words", _length_is("many")),
    Lie("length-huge", _length_is("9" * 40)),
    Lie("no-length", _head(lambda request: "HTTP/1.1 200 OK\n\n"), helps=True),
    Lie("http-0.9", _head(lambda request: "")),
    Lie("no-http", _head(lambda request: "SSH-2.0-OpenSSH_9.2\n\n")),
    Lie("status-words", _head(lambda request: "HTTP/1.1 OK fine\n\n")),
    Lie("empty", lambda request, answer: None),
    Lie("reset-at-once", lambda request, answer: answer.reset()),
    Lie("endless", _endless),
    Lie("endless-chunks", _endless_chunks),
    Lie("endless-head", _endless_head),
    Lie("continues", _continues),
    Lie("flipped-bit", _flipped),
    Lie("stall", lambda request, answer: answer.sleep(5)),
    Lie("drip-head", functools.partial(drip, head=True)),
    Lie("drip-body", functools.partial(drip, head=False)),
    Lie("redirect-elsewhere", _status("302 Found", "Location: http://127.0.0.2:9/x\n")),
    Lie("redirect-file", _status("302 Found", "Location: file:///etc/hostname\n")),
    Lie("redirect-nowhere", _status("302 Found")),
    Lie("redirect-odd", _status("301 Moved", "Location: http://[::1\n")),
    Lie("redirect-loop", _loop),
    Lie("retry-later", _status("503 Busy", "Retry-After: soon\n")),
    *(
        Lie(f"status-{status}", _status(f"{status} Word"))
        for status in (204, 304, 400, 401, 403, 404, 407, 410, 416, 418, 429, 500, 502, 504, 599)
    ),
)
MODES = ("good-second", "alone", "heals", "resumed", "resumed-wrong")


@dataclass(frozen=True)
class _Case:
    name: str
    mode: str
    lie: Lie
    seed: str


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See edgecascade.fleet.faults."""
    tried, failures = 0, []
    for each in _cases(seed, count):
        if case is None or case == each.name:
            tried += 1
            if message := _try(each):
                failures.append(Failure(each.name, message))
    return Outcome(tried, tuple(failures))


def _cases(seed: int, count: int) -> Iterator[_Case]:
    every = [(mode, lie) for lie in LIES_TOLD for mode in MODES]
    rng = random.Random(seed)
    rng.shuffle(every)
    for index in range(count):
        mode, lie = every[index % len(every)]
        name = f"{index}-{mode}-{lie.name}"
        yield _Case(name, mode, lie, f"{seed}-{name}")


def _try(case: _Case) -> str:
    """What is wrong with how this case went; empty if nothing."""
    rng = random.Random(case.seed)
    sizes = (SIZE, rng.randrange(1, SIZE)) if case.mode == "good-second" else (SIZE,)
    files = {hashlib.sha256(data).hexdigest(): data for data in map(rng.randbytes, sizes)}
    lies = 2 if case.mode == "heals" else 10**9
    with (
        tempfile.TemporaryDirectory() as place,
        Site(files, lambda request: case.lie.tell if request.number < lies else None) as bad,
        Site(files) as good,
    ):
        folder = Path(place)
        sources = [HttpSource(bad.url, PATIENCE)]
        if case.mode != "alone" and case.mode != "heals":
            sources.append(HttpSource(good.url, PATIENCE))
        if case.mode.startswith("resumed"):
            _leave(folder, files, rng, right=case.mode == "resumed")
        return _download(case, files, folder, sources)


def _leave(folder: Path, files: dict[str, bytes], rng: random.Random, *, right: bool) -> None:
    """What an earlier run may have left: a beginning, something else, or too much."""
    for sha256, data in files.items():
        half = data[: rng.randrange(1, len(data))]
        other = rng.choice((rng.randbytes(len(half)), rng.randbytes(len(data)), data + b"more"))
        (folder / sha256).write_bytes(half if right else other)


def _download(case: _Case, files: dict[str, bytes], folder: Path, sources: list[HttpSource]) -> str:
    blobs = [Blob(sha256, len(data)) for sha256, data in files.items()]
    kept: dict[str, bytes] = {}
    largest = 0

    def keep(blob: Blob, path: Path) -> None:
        kept[blob.sha256] = path.read_bytes()

    def on_bytes(count: int) -> None:
        nonlocal largest
        for part in folder.iterdir():
            if part.name in files:
                largest = max(largest, part.stat().st_size - len(files[part.name]))

    begun = time.monotonic()
    error: DownloadFailed | None = None
    try:
        Downloader(folder, sources, pace=PACE, patience=PATIENCE, on_bytes=on_bytes).fetch(
            blobs, keep
        )
    except DownloadFailed as failed:
        error = failed
    if time.monotonic() - begun > BOUND_S:
        return f"took {time.monotonic() - begun:.1f} s"
    if largest > 0:
        return f"a file had {largest} bytes more than were signed"
    if any(kept[sha256] != files[sha256] for sha256 in kept):
        return "a file was kept with another content"
    if error is None:
        return "" if kept.keys() == files.keys() else "ended without all files and without an error"
    if not error.reason or not all(error.mirrors.values()):
        return f"failed without saying why: {error}"
    if len(sources) > 1 or case.lie.helps:
        return f"failed although it could be had: {error}"
    return ""
