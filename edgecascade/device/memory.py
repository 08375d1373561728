# SPDX-License-Identifier: Apache-2.0
"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def memory_bytes(field: str = "MemAvailable", meminfo: Path = MEMINFO) -> int | None:
    """A field of /proc/meminfo in bytes, or None where there is none. MemAvailable counts what the page cache would give back."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
