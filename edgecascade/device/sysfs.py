# SPDX-License-Identifier: Apache-2.0
"""Reads of sysfs, /proc and /etc that never fail: what cannot be read is None.

Sensors come and go while they are read: a gated GPU answers EAGAIN, a rebound driver takes its
folder away, a kernel of another release spells a file differently. Facts about the device are
optional everywhere, so one bad file costs one field.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")
# nvpmodel.conf is the longest file read, at some 30 kB. The bound is for what is not what it seems.
MAX_BYTES = 256 * 1024
# int() also takes underscores, other scripts' digits and surrounding blanks.
INTEGER = re.compile(r"[+-]?[0-9]{1,18}|0x[0-9a-fA-F]{1,15}")


def read_text(path: Path) -> str | None:
    """The file's text without surrounding blanks; None where it is unreadable or empty.

    NUL bytes, which end the strings of a device tree, become line ends.
    """
    try:
        # O_NONBLOCK: a pipe in a sensor's place must not hold up the caller.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    data = b""
    try:
        while len(data) < MAX_BYTES and (piece := os.read(file, MAX_BYTES - len(data))):
            data += piece
    except OSError:
        return None
    finally:
        os.close(file)
    return data.decode("utf-8", "replace").replace("\0", "\n").strip() or None


def parse_int(text: str | None, low: int, high: int) -> int | None:
    """A decimal or 0x number between low and high, else None."""
    if text is None or not INTEGER.fullmatch(text):
        return None
    value = int(text, 16 if text.startswith("0x") else 10)
    return value if low <= value <= high else None


def read_int(path: Path, low: int, high: int) -> int | None:
    """The file's only number if it lies between low and high, else None."""
    return parse_int(read_text(path), low, high)


def names(folder: Path) -> list[str]:
    """Sorted names in a folder; none where it is unreadable."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
