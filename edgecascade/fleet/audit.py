# SPDX-License-Identifier: Apache-2.0
"""What operators did, one JSON line each: appended, fsynced, each chained to the one before.

A line holds the sha256 of the line before it, so a change, a removal or an insertion anywhere
breaks the chain. Whoever keeps the newest hash elsewhere also sees that the end was cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecascade.errors import FleetError
from edgecascade.files import fsync_folder

START = "0" * 64
TORN = "torn-line"  # says that the line before it was cut by a crash and never counted
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """A log that chains: how many lines, and the hash that the next one will hold."""

    lines: int
    head: str


def append(path: Path, event: str, ts: float, facts: Mapping[str, Any]) -> str:
    """Add a line and wait until it is on the disk; the new head."""
    made = not path.exists()
    with open(path, "a+b") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # two commands at once must not chain to the same line
        last = _last_line(log.fileno())
        if last and not last.endswith(b"\n"):
            os.write(log.fileno(), b"\n")
            last += b"\n"
        if last and _parse(last) is None:
            last = _write(log.fileno(), {"event": TORN, "prev": _hash(last), "ts": ts})
        prev = _hash(last) if last else START
        line = _write(log.fileno(), {**facts, "event": event, "prev": prev, "ts": ts})
        os.fsync(log.fileno())
    if made:
        fsync_folder(path.parent)
    return _hash(line)


def _write(fd: int, record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True, allow_nan=False)
    line = text.encode() + b"\n"
    if os.write(fd, line) != len(line):  # the next append finds a torn line
        raise OSError(f"the audit log took only a part of {len(line)} bytes")
    return line


def _last_line(fd: int) -> bytes:
    end = start = os.fstat(fd).st_size
    tail = b""
    while start and tail.count(b"\n", 0, -1) == 0:
        start = max(0, start - READ_BYTES)
        tail = os.pread(fd, end - start, start)
    return tail[tail.rfind(b"\n", 0, -1) + 1 :] if tail else b""


def verify(path: Path, expect: str | None = None) -> Verdict:
    """Check every link of the chain; `expect` is a head that was seen before.

    A crash may have cut one line; the line after it must say so.

    Raises:
        FleetError: naming the first line that does not fit.
    """
    heads = {START}
    head, lines, torn = START, 0, False
    for raw, record in records(path):
        lines += 1
        if record is None and torn:
            raise _broken(f"{path}: neither line {lines - 1} nor line {lines} is JSON")
        fits = record is None or record.get("prev") == head
        explained = record is None or torn == (record.get("event") == TORN)
        if not (fits and explained):
            raise _broken(f"{path}: line {lines} does not follow from the line before it")
        torn = record is None
        head = _hash(raw)
        heads.add(head)
    if expect is not None and expect not in heads:
        raise _broken(f"{path}: no line of {lines} has the hash {expect}; lines are missing")
    return Verdict(lines, head)


def _broken(message: str) -> FleetError:
    return FleetError(message, reason="audit-broken")


def records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line as it is, and what it says; None for one that is no JSON object."""
    with open(path, "rb") as log:
        for raw in log:
            yield raw, _parse(raw)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
