# SPDX-License-Identifier: Apache-2.0
"""Remembers which files were hashed before, so that loading 17 GB again costs no second pass.

A stamp names a file by device and inode and holds size, times and digest. Any write to the file
changes its ctime, which no program can set back; then the stamp no longer fits and the file is
hashed again. What a stamp cannot see is a disk that returns other bytes than were written: `inspect
--verify` reads them all.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from edgecascade.files import canonical_json

log = logging.getLogger(__name__)

# A write within the kernel's clock tick of an earlier one leaves ctime as it was (4 ms at 250 Hz,
# 10 ms at 100 Hz).
CLOCK_TICK_S = 0.02


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
        stamp = json.loads(_stamp_path(path).read_bytes())
        return bool(stamp == {**_facts(path), "sha256": sha256})
    except (OSError, ValueError, RuntimeError):  # RuntimeError: this user has no home folder
        return False


def remember(path: Path, before: Facts, sha256: str) -> None:
    """Note that the file, as it was `before`, has this digest.

    A cache folder that cannot be written costs only time.
    """
    try:
        if _facts(path) != before:
            return
        stamp = _stamp_path(path)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        part = stamp.with_name(f"{stamp.name}.{os.getpid()}.part")
        part.write_bytes(canonical_json({**before, "sha256": sha256}))
        os.replace(part, stamp)
    except (OSError, RuntimeError) as error:
        log.debug("no stamp for %s: %s", path, error)


def _facts(path: Path) -> Facts:
    stat = os.stat(path)
    return {
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _stamp_path(path: Path) -> Path:
    stat = os.stat(path)
    return cache_folder() / "verified" / f"{stat.st_dev}-{stat.st_ino}.json"
