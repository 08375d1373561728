# SPDX-License-Identifier: Apache-2.0
"""Is the device slower than its power mode allows, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgecascade.device.clocks import GpuClock, PowerMode
from edgecascade.device.power import Rail
from edgecascade.device.sysfs import ROOT, names, read_int, read_text
from edgecascade.device.thermal import Cooling, Zone

NEAR_TRIP_C = 3.0
# cur_freq is measured and wobbles by a few kHz; the steps below a cap are at least 5 % apart.
BELOW_CAP = 0.97
EVENT_COUNT = re.compile(r"oc([0-9])_event_cnt")


@dataclass(frozen=True)
class Throttling:
    """`active` is None where nothing on this machine could tell."""

    active: bool | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the judgement rests on, all of one moment."""

    rails: tuple[Rail, ...] = ()
    gpu: GpuClock | None = None
    mode: PowerMode | None = None
    zones: tuple[Zone, ...] = ()
    cooling: tuple[Cooling, ...] = ()


def judge(seen: Evidence) -> Throttling:
    """Alarms of the rails, the thermal framework's own word, and a slow clock beside a hot zone."""
    reasons = (*_over_current(seen.rails), *_cooling(seen.cooling), *_slow_and_hot(seen))
    if reasons:
        return Throttling(True, reasons)
    return Throttling(False if _could_tell(seen) else None)


def read_over_current_events(root: Path = ROOT) -> int | None:
    """How often since boot the SoC's over-current detectors have throttled it (soctherm_oc)."""
    classes = root / "sys/class/hwmon"
    for name in names(classes):
        if read_text(classes / name / "name") == "soctherm_oc":
            return _events(classes / name)
    return None


def clock_cap_hz(gpu: GpuClock, mode: PowerMode | None) -> int | None:
    """What the clock may reach by the power mode.

    The thermal framework lowers max_freq itself, so it is only believed where the mode says
    nothing of the GPU.
    """
    if mode is not None and mode.gpu_uncapped:
        return max(gpu.steps_hz, default=gpu.max_hz)
    if mode is None or mode.gpu_cap_hz is None:
        return gpu.max_hz
    # A cap between two steps is rounded down to one of them.
    reachable = [step for step in gpu.steps_hz if step <= mode.gpu_cap_hz]
    return max(reachable, default=mode.gpu_cap_hz)


def _over_current(rails: tuple[Rail, ...]) -> Iterator[str]:
    for rail in rails:
        if rail.crit_alarm:
            yield f"over-current: {rail.name} passed its critical limit"
        elif rail.max_alarm:
            yield f"over-current: {rail.name} passed its limit"


def _cooling(cooling: tuple[Cooling, ...]) -> Iterator[str]:
    for device in cooling:
        if device.slows_down:
            yield f"thermal: {device.name} is at state {device.state}"


def _slow_and_hot(seen: Evidence) -> Iterator[str]:
    if seen.gpu is None or seen.gpu.now_hz is None:
        return
    cap_hz = clock_cap_hz(seen.gpu, seen.mode)
    if cap_hz is None or seen.gpu.now_hz >= BELOW_CAP * cap_hz:
        return
    hot = [z for z in seen.zones if z.trip_c is not None and z.temp_c >= z.trip_c - NEAR_TRIP_C]
    if hot:
        zone = max(hot, key=lambda zone: zone.temp_c)
        now_mhz, cap_mhz = seen.gpu.now_hz // 1_000_000, cap_hz // 1_000_000
        yield f"thermal: {zone.name} at {zone.temp_c:.1f} C, GPU at {now_mhz} of {cap_mhz} MHz"


def _could_tell(seen: Evidence) -> bool:
    alarms = any(r.crit_alarm is not None or r.max_alarm is not None for r in seen.rails)
    alerts = any(device.name.endswith("-throttle-alert") for device in seen.cooling)
    clocked = seen.gpu is not None and seen.gpu.now_hz is not None
    trips = any(zone.trip_c is not None for zone in seen.zones)
    capped = seen.gpu is not None and clock_cap_hz(seen.gpu, seen.mode) is not None
    return alarms or alerts or (clocked and capped and trips)


def _events(monitor: Path) -> int | None:
    files = names(monitor)
    counts: list[int | None] = []
    for detector in filter(None, map(EVENT_COUNT.fullmatch, files)):
        enabled = f"oc{detector[1]}_throt_en"
        reacts = read_int(monitor / enabled, 0, 1) if enabled in files else 1
        # Detectors whose reaction is switched off count events that slow nothing down.
        counts.append(reacts and read_int(monitor / detector[0], 0, 1 << 62))
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
