# SPDX-License-Identifier: Apache-2.0
"""One command at a time works on a file."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgecascade.errors import FleetError

LOCK_S = 30.0


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock `path` of `what`.

    Raises:
        FleetError: when another command holds it for long.
    """
    with open(path, "ab") as lock:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise FleetError(
                        f"another command works on {what}; end it first", reason="locked"
                    ) from None
                time.sleep(0.05)
        yield
