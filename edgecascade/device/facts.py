# SPDX-License-Identifier: Apache-2.0
"""All facts of one moment, for telemetry, for `doctor` and for the record of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgecascade.device.clocks import (
    GpuClock,
    PowerMode,
    read_emc_hz,
    read_gpu_clock,
    read_power_mode,
    read_sm_active,
)
from edgecascade.device.identity import Identity, read_identity
from edgecascade.device.memory import Memory, read_memory
from edgecascade.device.power import Power, PowerReader
from edgecascade.device.sysfs import ROOT
from edgecascade.device.thermal import Cooling, Zone, read_cooling, read_zones
from edgecascade.device.throttling import Evidence, Throttling, judge, read_over_current_events

Value = str | int | float | bool


@dataclass(frozen=True)
class DeviceFacts:
    """Absent is None or empty, never zero."""

    identity: Identity = field(default_factory=Identity)
    memory: Memory = field(default_factory=Memory)
    power: Power = field(default_factory=Power)
    zones: tuple[Zone, ...] = ()
    cooling: tuple[Cooling, ...] = ()
    gpu: GpuClock | None = None
    emc_hz: int | None = None
    mode: PowerMode | None = None
    sm_active: int | None = None
    over_current_events: int | None = None  # since boot
    throttling: Throttling = field(default_factory=Throttling)

    @property
    def hottest_c(self) -> float | None:
        """The temperature of the hottest zone."""
        return max((zone.temp_c for zone in self.zones), default=None)

    def telemetry(self) -> dict[str, Value]:
        """The moving facts, flat, with the unit in each name; what is absent has no key."""
        values: dict[str, Value | None] = {
            "power_mw": self.power.total_mw,
            "hottest_c": self.hottest_c,
            "gpu_load_percent": self.gpu.load_percent if self.gpu else None,
            "gpu_hz": self.gpu.now_hz if self.gpu else None,
            "emc_hz": self.emc_hz,
            "memory_available_bytes": self.memory.available_bytes,
            "memory_gpu_bytes": self.memory.gpu_bytes,
            "sm_active": self.sm_active,
            "power_mode": (self.mode.name or str(self.mode.id)) if self.mode else None,
            "throttled": self.throttling.active,
            "over_current_events": self.over_current_events,
        }
        return _present(values)

    def description(self) -> dict[str, Value]:
        """What stays as it is until the next boot, flat, for a device's info document."""
        values: dict[str, Value | None] = {
            "model": self.identity.model,
            "module": self.identity.name or self.identity.part,
            "chip": self.identity.chip,
            "compute_capability": self.identity.compute_capability,
            "sm_total": self.identity.sm_total,
            "l4t": self.identity.l4t,
            "jetpack": self.identity.jetpack,
            "memory_total_bytes": self.memory.total_bytes,
        }
        return _present(values)


def facts(root: Path = ROOT, power: PowerReader | None = None) -> DeviceFacts:
    """Read everything once. A reader that is kept saves the search for the power monitors, and
    looks at the alarms of the rails; else those are left to whoever keeps one.
    """
    identity = read_identity(root)
    drawn = PowerReader(root).read(alarms=False) if power is None else power.read()
    seen = Evidence(
        rails=drawn.rails,
        gpu=read_gpu_clock(root),
        mode=read_power_mode(root),
        zones=read_zones(root),
        cooling=read_cooling(root),
    )
    return DeviceFacts(
        identity=identity,
        memory=read_memory(root),
        power=drawn,
        zones=seen.zones,
        cooling=seen.cooling,
        gpu=seen.gpu,
        emc_hz=read_emc_hz(root),
        mode=seen.mode,
        sm_active=read_sm_active(identity.sm_total, root),
        over_current_events=read_over_current_events(root),
        throttling=judge(seen),
    )


def _present(values: dict[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}
