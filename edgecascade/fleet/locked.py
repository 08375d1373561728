# SPDX-License-Identifier: Apache-2.0
"""One process at a time works on a file or a folder."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgecascade.errors import FleetError

LOCK_S = 30.0


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock `path` of `what`.

    Raises:
        FleetError: when another command holds it for long.
    """
    with open(path, "ab") as lock:
        if not lock_within(lock, LOCK_S):
            raise FleetError(f"another command works on {what}; end it first", reason="locked")
        yield


def lock_within(lock: IO[bytes], wait_s: float) -> bool:
    """Lock an open file until it is closed; False when another process holds it for so long."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
