# SPDX-License-Identifier: Apache-2.0
"""How much memory this machine has left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgecascade.device.sysfs import ROOT, read_text

MEMINFO = Path("/proc/meminfo")
LINE = re.compile(r"(\S+):\s+([0-9]{1,15}) kB")


@dataclass(frozen=True)
class Memory:
    """CPU and GPU share it on a Jetson: there is no other memory to count."""

    total_bytes: int | None = None
    available_bytes: int | None = None  # counts what the page cache would give back
    gpu_bytes: int | None = None  # what NvMap has handed to GPU and engines; Jetson only


def memory_bytes(field: str = "MemAvailable", meminfo: Path = MEMINFO) -> int | None:
    """A field of /proc/meminfo in bytes, or None where there is none."""
    return _fields(meminfo).get(field)


def read_memory(root: Path = ROOT) -> Memory:
    """The fields of /proc/meminfo that matter for admission."""
    fields = _fields(root / "proc/meminfo")
    return Memory(fields.get("MemTotal"), fields.get("MemAvailable"), fields.get("NvMapMemUsed"))


def _fields(meminfo: Path) -> dict[str, int]:
    lines = (read_text(meminfo) or "").splitlines()
    return {m[1]: int(m[2]) * 1024 for line in lines if (m := LINE.fullmatch(line.strip()))}
