# SPDX-License-Identifier: Apache-2.0
"""Fetches blobs from an ordered list of mirrors: resumed, bounded, paced, and hashed on the way.

A blob is named by its hash and its size, which somebody signed; a mirror is only asked. What came
of a blob so far lies in `partial/<sha256>` and is continued after a restart. Nothing is kept that
does not have its hash; nothing is written beyond the signed size.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecascade.errors import DownloadFailed
from edgecascade.files import fsync_file
from edgecascade.fleet.sources import Body, Patience, Source, SourceFault, blocks

log = logging.getLogger(__name__)

RESERVE = ".reserve"
MAX_WRONG = 3  # blobs with another hash from one mirror: it is asked no more
SHARE_S = 0.05  # what a rate limit allows in this time may go at once
BLOCK_BYTES = 1 << 20  # read at once when a file is taken up again
WRONG = frozenset({"wrong-hash", "wrong-size", "wrong-range", "wrong-answer"})
MIN_GAIN_BYTES = 64 << 10  # fewer from a mirror than this, or than was lacking, are no progress
REST_S = 15.0  # a mirror that did not answer is asked last for so long
SPARE_BYTES = 256 << 10  # room that is left to others
SHRINK_BYTES = 2 << 20  # held twice at most: with state and folders, less than the store's margin


@dataclass(frozen=True)
class Blob:
    """A file that is known by what it holds."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Pace:
    """How fast, how many at once, and how stubbornly."""

    bytes_per_s: float | None = None
    parallel: int = 4
    rounds: int = 5  # through all mirrors without one more byte
    pause_s: float = 1.0  # before the second round; doubled for each further one
    longest_pause_s: float = 60.0


class DownloadStopped(Exception):
    """It was stopped; what came so far stays."""


class Throttle:
    """A token bucket that all files share."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def delay(self, size: int) -> float:
        """How long to wait before so many bytes are taken."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - SHARE_S) + size / self._rate
            return max(0.0, self._free_at - now)


class _Reserve:
    """Keeps the room that a download needs, so that nobody else can fill the disk meanwhile."""

    def __init__(self, folder: Path, need: int) -> None:
        self._path = folder / RESERVE
        self._path.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._need = self._held = need
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        if free < need + SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{need + SPARE_BYTES} bytes are needed, {free} are free")
        self._fd = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._fd, 0, max(1, need))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.close()
                raise
            self._held = 0  # this file system cannot: the check above must do

    def spend(self, size: int) -> None:
        """Give so many bytes free; more than are left when a file begins anew."""
        with self._lock:
            self._need = max(0, self._need - size)
            if self._held - self._need >= SHRINK_BYTES:
                self._held = self._need
                os.ftruncate(self._fd, self._held)

    def close(self) -> None:
        """Give all of it free."""
        os.close(self._fd)
        self._path.unlink(missing_ok=True)


@dataclass(eq=False)
class _Mirror:
    """A source, and what is known of it."""

    source: Source
    said: str = "not asked"
    reason: str = "not-asked"
    wrong: int = 0
    rest_until: float = 0.0  # ask others before it
    closed_until: float = 0.0  # it said so itself


@dataclass
class _Part:
    """A blob on its way."""

    blob: Blob
    path: Path
    got: int = 0
    reached: int = 0  # the most it ever had: a mirror that begins anew each time is no progress
    digest: Any = field(default_factory=hashlib.sha256)
    origin: _Mirror | None = None  # where all its bytes are from, if from one
    etag: str | None = None
    single: bool = False  # a mixture was wrong: from now on one mirror must give all of it
    without: set[_Mirror] = field(default_factory=set)  # they cannot give it
    doubted: set[_Mirror] = field(default_factory=set)  # they gave all of it with another hash
    again: bool = False  # those have their second try

    @property
    def lacking(self) -> int:
        return self.blob.size - self.got

    def resume(self) -> None:
        """Take up what an earlier run left."""
        with open(self.path, "ab"):
            pass
        if self.path.stat().st_size > self.blob.size:
            self.restart()
        with open(self.path, "rb", buffering=0) as source:
            while block := source.read(BLOCK_BYTES):
                self.digest.update(block)
                self.got += len(block)
        self.reached = self.got

    def restart(self) -> None:
        os.truncate(self.path, 0)
        self.got, self.digest, self.origin, self.etag = 0, hashlib.sha256(), None, None


class Downloader:
    """One download of several blobs. `stop` may be called from any thread.

    `on_bytes` hears how many bytes came; fewer than none when a file begins anew.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        pace: Pace = Pace(),
        patience: Patience = Patience(),  # noqa: B008  frozen
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._folder = folder
        self._mirrors = [_Mirror(source) for source in sources]
        self._pace, self._patience, self._on_bytes = pace, patience, on_bytes
        self._throttle = Throttle(pace.bytes_per_s)
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # of the bodies
        self._bodies: set[Body] = set()

    def stop(self) -> None:
        """Make `fetch` end with DownloadStopped; what came so far stays."""
        self._stopping.set()
        with self._lock:
            for body in self._bodies:
                body.abort()

    def fetch(self, blobs: Sequence[Blob], keep: Callable[[Blob, Path], None]) -> None:
        """Bring all these blobs; `keep` takes each file when it has its hash and is durable.

        Raises:
            DownloadFailed: without a byte when the disk has no room; when no mirror has a blob.
            DownloadStopped: after stop().
        """
        try:
            self._fetch(blobs, keep)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DownloadFailed(
                f"the disk does not take the download: {error}",
                reason="disk-full" if full else "disk-failed",
                mirrors={},
            ) from error

    def _fetch(self, blobs: Sequence[Blob], keep: Callable[[Blob, Path], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        parts = [_Part(blob, self._folder / blob.sha256) for blob in dict.fromkeys(blobs)]
        have = sum(_size(part.path) for part in parts)
        reserve = _Reserve(self._folder, max(0, sum(part.blob.size for part in parts) - have))

        def one(part: _Part) -> None:
            part.resume()
            self._bring(part, reserve)
            keep(part.blob, part.path)

        try:
            with ThreadPoolExecutor(self._pace.parallel, "fetch") as pool:
                futures = [pool.submit(one, part) for part in parts]
                _, rest = wait(futures, return_when=FIRST_EXCEPTION)
                if rest:
                    self.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
        finally:
            reserve.close()
        errors = [e for f in futures if not f.cancelled() and (e := f.exception())]
        # All but the first may have been stopped because of it.
        errors.sort(key=lambda error: isinstance(error, DownloadStopped))
        if errors:
            raise errors[0]

    def _bring(self, part: _Part, reserve: _Reserve) -> None:
        """Ask the mirrors, in order and again, until the blob is whole."""
        fruitless, pause_s = 0, self._pace.pause_s
        while not self._whole(part):
            if not (able := self._able(part) or self._second_try(part)):
                raise self._failure(part, final=True)
            fruitless += 1
            for mirror in able:
                if self._use(part, mirror, reserve):
                    fruitless = 0
                if part.lacking == 0:
                    break
            if part.lacking and fruitless and (able := self._able(part)):
                if fruitless >= self._pace.rounds:
                    raise self._failure(part, final=False)
                asked_s = min(mirror.closed_until for mirror in able) - time.monotonic()
                self._sleep(max(asked_s, random.uniform(0.5, 1.0) * pause_s))
                pause_s = min(2 * pause_s, self._pace.longest_pause_s)

    def _whole(self, part: _Part) -> bool:
        """Whether the blob has its size and hash, durably; a wrong one is begun anew."""
        if part.lacking:
            return False
        if part.digest.hexdigest() == part.blob.sha256:
            fsync_file(part.path)
            return True
        if part.origin is None:
            part.single = True  # of several mirrors, or an earlier run: nobody can be blamed
            part.reached = 0
        else:
            text = f"{part.blob.sha256} has the hash {part.digest.hexdigest()}"
            self._note(part, part.origin, SourceFault("wrong-hash", text, lasting=True))
            part.doubted.add(part.origin)
        self._restart(part)
        return False

    def _able(self, part: _Part) -> list[_Mirror]:
        """Mirrors that may have the blob, in order; those that did not answer lately come last."""
        now = time.monotonic()
        able = [m for m in self._mirrors if m not in part.without and m.wrong < MAX_WRONG]
        return sorted(able, key=lambda mirror: mirror.rest_until > now)

    def _second_try(self, part: _Part) -> list[_Mirror]:
        """When nobody else is left: a wire corrupts now and then what TCP's sum does not notice."""
        if part.again:
            return []
        part.again, part.reached = True, 0
        part.without -= part.doubted
        return self._able(part)

    def _use(self, part: _Part, mirror: _Mirror, reserve: _Reserve) -> bool:
        """Take what a mirror gives for as long as it gives; whether that was progress."""
        progress = False
        while True:
            self._check()
            wanted = min(MIN_GAIN_BYTES, part.blob.size - part.reached)
            try:
                self._read(part, mirror, reserve)
                return True
            except SourceFault as fault:
                self._check()  # a connection that we cut ourselves is nobody's fault
                self._note(part, mirror, fault)
                gained = part.got >= part.reached + wanted > part.reached
                part.reached = max(part.reached, part.got)
                progress |= gained
                if fault.lasting or not gained:
                    return progress

    def _read(self, part: _Part, mirror: _Mirror, reserve: _Reserve) -> None:
        if part.origin is not mirror:
            if part.single:
                self._restart(part)
            part.origin, part.etag = (None if part.got else mirror), None
        body = mirror.source.open(part.blob.sha256, part.got, part.blob.size, part.etag)
        with self._lock:
            self._bodies.add(body)
        try:
            if body.start != part.got:
                self._restart(part)
                part.origin = mirror
            part.etag = body.etag
            with open(part.path, "r+b", buffering=0) as out:
                out.seek(part.got)
                for block in blocks(body, self._patience):
                    self._take(part, out, block, reserve)
        finally:
            with self._lock:
                self._bodies.discard(body)
            body.close()
        if part.lacking:
            raise SourceFault("unreachable", f"ended {part.lacking} bytes before the end")

    def _take(self, part: _Part, out: Any, block: bytes, reserve: _Reserve) -> None:
        if len(block) > part.lacking:
            self._restart(part)
            raise SourceFault(
                "wrong-size", f"more than the {part.blob.size} bytes that were signed", lasting=True
            )
        self._sleep(self._throttle.delay(len(block)))
        reserve.spend(len(block))
        written = 0
        while written < len(block):
            written += out.write(memoryview(block)[written:])
        part.digest.update(block)
        part.got += len(block)
        self._on_bytes(len(block))

    def _restart(self, part: _Part) -> None:
        self._on_bytes(-part.got)
        part.restart()

    def _note(self, part: _Part, mirror: _Mirror, fault: SourceFault) -> None:
        mirror.said, mirror.reason = f"{fault.reason}: {fault}", fault.reason
        log.info("%s for %s: %s", mirror.source.name, part.blob.sha256, mirror.said)
        if fault.reason == "changed":
            self._restart(part)
        if fault.lasting:
            part.without.add(mirror)
            mirror.wrong += fault.reason in WRONG
        else:
            now = time.monotonic()
            mirror.rest_until, mirror.closed_until = now + REST_S, now + fault.wait_s

    def _check(self) -> None:
        if self._stopping.is_set():
            raise DownloadStopped("the download was stopped")

    def _sleep(self, delay_s: float) -> None:
        if delay_s > 0:
            self._stopping.wait(delay_s)
        self._check()

    def _failure(self, part: _Part, *, final: bool) -> DownloadFailed:
        mirrors = {mirror.source.name: mirror.said for mirror in self._mirrors}
        reasons = {mirror.reason for mirror in self._mirrors}
        reason = reasons.pop() if len(reasons) == 1 else "no-mirror"
        said = "; ".join(f"{name}: {text}" for name, text in mirrors.items())
        return DownloadFailed(
            f"no mirror gave blob {part.blob.sha256} of {part.blob.size} bytes ({said})",
            reason=reason, mirrors=mirrors, final=final,
        )  # fmt: skip


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
