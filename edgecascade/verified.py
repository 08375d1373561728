# SPDX-License-Identifier: Apache-2.0
"""Remembers which files were hashed before, so that loading 17 GB again costs no second pass.

A stamp names a file by device and inode and holds size, times and digest. A write to the file
changes its ctime, which no program can set back; then the stamp no longer fits and the file is
hashed again. What a stamp cannot see is a disk that returns other bytes than were written, and a
program that had mapped the file for writing before it was hashed: `inspect --verify` reads all.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgecascade.files import canonical_json

log = logging.getLogger(__name__)

# A write within the kernel's clock tick of an earlier one leaves ctime as it was (4 ms at 250 Hz,
# 10 ms at 100 Hz).
CLOCK_TICK_S = 0.02
MAX_STAMPS = 2000  # 200 bytes each; a bundle has up to some hundred files


def cache_folder() -> Path:
    """This user's cache folder for this program."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgecascade"


Facts = dict[str, int]


def facts(path: Path) -> Facts:
    """What identifies this state of a file. Take it before reading the file, pass it to `remember`
    after.
    """
    age_s = time.time() - os.stat(path).st_ctime
    if 0 <= age_s < CLOCK_TICK_S:
        time.sleep(CLOCK_TICK_S)
    return _facts(path)


def is_verified(path: Path, sha256: str) -> bool:
    """Whether this very file was found to have this digest, and not written since."""
    try:
        return _stamp_of(path) == {**_facts(path), "sha256": sha256}
    except OSError:
        return False


def remember(path: Path, before: Facts, sha256: str) -> None:
    """Note that the file, as it was `before`, has this digest.

    A cache folder that cannot be written costs only time.
    """
    try:
        if _facts(path) != before:
            return
        _write_stamp(path, {**before, "sha256": sha256})
    except (OSError, RuntimeError) as error:
        log.debug("no stamp for %s: %s", path, error)


@contextmanager
def same_content(path: Path) -> Iterator[None]:
    """Around a change of a file's names, which moves its ctime but none of its bytes.

    A stamp that fits before is made to fit after; the stamp of a file without names goes, too.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # absent or a link: it has no stamp
        yield
        return
    try:
        before = _facts(fd)
        stamp = _stamp_of(fd)
        yield
        if stamp is None or {**stamp, "sha256": ""} != {**before, "sha256": ""}:
            return
        with suppress(OSError):  # a stamp that does not fit costs only time
            if os.stat(fd).st_nlink:
                _write_stamp(fd, {**_facts(fd), "sha256": stamp["sha256"]})
            else:
                _stamp_path(fd).unlink(missing_ok=True)
    finally:
        os.close(fd)


def _stamp_of(file: Path | int) -> dict[str, Any] | None:
    try:
        path = _stamp_path(file)
        if os.stat(path.parent).st_mode & stat.S_IWOTH:
            return None  # anybody may have written it
        stamp = json.loads(path.read_bytes())
        return stamp if isinstance(stamp, dict) else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: this user has no home folder
        return None


def _write_stamp(file: Path | int, stamp: dict[str, Any]) -> None:
    path = _stamp_path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(canonical_json(stamp))
    os.replace(part, path)
    _drop_oldest(path.parent)


def _drop_oldest(folder: Path) -> None:
    """A file that is deleted does not say so here: its stamp goes when there are too many."""
    stamps = list(os.scandir(folder))
    if len(stamps) <= MAX_STAMPS:
        return
    written = []
    for stamp in stamps:
        with suppress(FileNotFoundError):  # another process drops some, too
            written.append((stamp.stat(follow_symlinks=False).st_mtime_ns, stamp.path))
    for _, path in sorted(written)[: len(stamps) - MAX_STAMPS // 2]:
        Path(path).unlink(missing_ok=True)


def _facts(file: Path | int) -> Facts:
    found = os.stat(file)
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _stamp_path(file: Path | int) -> Path:
    found = os.stat(file)
    return cache_folder() / "verified" / f"{found.st_dev}-{found.st_ino}.json"
