# SPDX-License-Identifier: Apache-2.0
"""Lines of tegrastats. Their spelling drifts from release to release, so every part is optional.

sysfs says the same with less delay and is preferred. Only tegrastats tells the largest free block,
which is what a large allocation needs, and logs of it are what people send.

    RAM 3170/15656MB (lfb 5x4MB) CPU [9%@729,off,7%@729] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407]
    tj@46.5C VDD_IN 5002mW/4970mW
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MB = 1024 * 1024
RAM = re.compile(r"\bRAM ([0-9]{1,9})/([0-9]{1,9})MB")
LARGEST_BLOCKS = re.compile(r"\blfb ([0-9]{1,9})x([0-9]{1,9})([MK])B")
CPU = re.compile(r"\bCPU \[([^\]]{0,4096})\]")
LOAD = re.compile(r"([0-9]{1,3})%")
ENGINE = r"\b{name}(?:_FREQ)? (?:([0-9]{{1,3}})%)?(?:@\[?([0-9, ]{{1,200}})\]?)?"
GPU = re.compile(ENGINE.format(name="GR3D"))
EMC = re.compile(ENGINE.format(name="EMC"))
# The second number of a temperature is its peak so far. A zone without power reads -256C.
TEMPERATURE = re.compile(r"\b([A-Za-z][\w.-]*)@(-?[0-9]{1,3}(?:\.[0-9]{1,4})?)C\b")
# Releases before 35 leave out the unit; 39 adds a third number, the peak.
RAIL = re.compile(r"\b(V[A-Z0-9_]+|POM_\w+) (-?[0-9]{1,7})(?:mW)?/(-?[0-9]{1,7})(?:mW)?(?=[\s/]|$)")
MIN_C, MAX_C = -55.0, 150.0


@dataclass(frozen=True)
class RailStats:
    """One rail: now, and the mean since tegrastats was started."""

    name: str
    power_mw: int
    mean_mw: int


@dataclass(frozen=True)
class TegraStats:
    """What one line tells."""

    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None
    largest_free_block_bytes: int | None = None
    cpu_load_percent: tuple[float | None, ...] = ()  # None for a core that is off
    gpu_load_percent: float | None = None
    gpu_hz: tuple[int, ...] = ()  # one for each graphics cluster
    emc_load_percent: float | None = None
    emc_hz: int | None = None
    temps_c: tuple[tuple[str, float], ...] = ()
    rails: tuple[RailStats, ...] = ()


def parse_line(line: str) -> TegraStats:
    """What is understood of a line; nothing of a line from elsewhere."""
    ram = RAM.search(line)
    block = LARGEST_BLOCKS.search(line)
    gpu_load_percent, gpu_hz = _engine(GPU, line)
    emc_load_percent, emc_hz = _engine(EMC, line)
    cpu = CPU.search(line)
    return TegraStats(
        ram_used_bytes=int(ram[1]) * MB if ram else None,
        ram_total_bytes=int(ram[2]) * MB if ram else None,
        largest_free_block_bytes=int(block[2]) * (MB if block[3] == "M" else 1024)
        if block
        else None,
        cpu_load_percent=tuple(map(_load, cpu[1].split(","))) if cpu else (),
        gpu_load_percent=gpu_load_percent,
        gpu_hz=gpu_hz,
        emc_load_percent=emc_load_percent,
        emc_hz=emc_hz[0] if emc_hz else None,
        temps_c=tuple(
            (name.removesuffix("-thermal"), float(value))
            for name, value in TEMPERATURE.findall(line)
            if MIN_C <= float(value) <= MAX_C
        ),
        rails=tuple(RailStats(n, int(now), int(mean)) for n, now, mean in RAIL.findall(line)),
    )


def _load(core: str) -> float | None:
    load = LOAD.match(core.strip())
    return float(load[1]) if load else None


def _engine(pattern: re.Pattern[str], line: str) -> tuple[float | None, tuple[int, ...]]:
    """Load in percent and clocks in Hz; Thor prints no load for its GPU."""
    found = pattern.search(line)
    if found is None:
        return None, ()
    load_percent = float(found[1]) if found[1] else None
    clocks = (clock.strip() for clock in (found[2] or "").split(","))
    return load_percent, tuple(int(mhz) * 1_000_000 for mhz in clocks if mhz.isdecimal())
