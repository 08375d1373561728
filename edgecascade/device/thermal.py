# SPDX-License-Identifier: Apache-2.0
"""Temperatures, and what the kernel's thermal framework is doing about them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgecascade.device.sysfs import ROOT, names, read_int, read_text

# Silicon lives within these. A zone whose power is off reads -256 C.
MIN_MC, MAX_MC = -55_000, 150_000
TRIP_TYPE = re.compile(r"trip_point_[0-9]{1,3}_type")


@dataclass(frozen=True)
class Zone:
    """One sensor, and the temperature at which the kernel begins to slow things down."""

    name: str
    temp_c: float
    trip_c: float | None = None


@dataclass(frozen=True)
class Cooling:
    """What the kernel may do against heat. State 0 does nothing."""

    name: str
    state: int

    @property
    def slows_down(self) -> bool:
        """Whether it now takes speed away; fans and warnings about a hot case do not."""
        slowing = self.name.endswith("-throttle-alert") or self.name.startswith(
            ("devfreq-", "cpufreq-", "thermal-cpufreq-", "thermal-devfreq-")
        )
        return slowing and self.state > 0


def read_zones(root: Path = ROOT) -> tuple[Zone, ...]:
    """The zones that can be read now."""
    return tuple(_zones(root / "sys/class/thermal"))


def read_cooling(root: Path = ROOT) -> tuple[Cooling, ...]:
    """The cooling devices that can be read now."""
    return tuple(_cooling(root / "sys/class/thermal"))


def _zones(folder: Path) -> Iterator[Zone]:
    for name in names(folder):
        if not name.startswith("thermal_zone"):
            continue
        kind = read_text(folder / name / "type")
        temp_mc = read_int(folder / name / "temp", MIN_MC, MAX_MC)
        if kind and temp_mc is not None:
            yield Zone(kind.removesuffix("-thermal"), temp_mc / 1000, _trip_c(folder / name))


def _trip_c(zone: Path) -> float | None:
    """The lowest passive trip, else the critical one. Active trips drive a fan, hot ones warn."""
    trips: dict[str, int] = {}
    for name in names(zone):
        if TRIP_TYPE.fullmatch(name):
            kind = read_text(zone / name) or ""
            temp_mc = read_int(zone / name.replace("_type", "_temp"), 1, MAX_MC)
            if temp_mc is not None:
                trips[kind] = min(temp_mc, trips.get(kind, temp_mc))
    temp_mc = trips.get("passive", trips.get("critical"))
    return None if temp_mc is None else temp_mc / 1000


def _cooling(folder: Path) -> Iterator[Cooling]:
    for name in names(folder):
        if not name.startswith("cooling_device"):
            continue
        kind = read_text(folder / name / "type")
        state = read_int(folder / name / "cur_state", 0, 100_000)
        if kind and state is not None:
            yield Cooling(kind, state)
