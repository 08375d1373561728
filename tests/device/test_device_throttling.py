# SPDX-License-Identifier: Apache-2.0
"""When a device counts as throttled, and when nothing can be said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgecascade.device.clocks import GpuClock, PowerMode
from edgecascade.device.power import Rail
from edgecascade.device.thermal import Cooling, Zone
from edgecascade.device.throttling import Evidence, Throttling, clock_cap_hz, judge

MHZ = 1_000_000
STEPS = tuple(step * MHZ for step in (306, 408, 510, 612, 714, 816, 918))
FULL = GpuClock("17000000.gpu", 918 * MHZ, 918 * MHZ, STEPS, 99.0)
SLOW = replace(FULL, now_hz=816 * MHZ)
MAXN = PowerMode(0, "MAXN", gpu_uncapped=True)
HOT, WARM = Zone("tj", 97.5, 99.0), Zone("tj", 80.0, 99.0)


def test_nothing_to_judge_by_is_unknown() -> None:
    assert judge(Evidence()) == Throttling(None, ())
    assert judge(Evidence(zones=(HOT,))).active is None
    assert judge(Evidence(gpu=SLOW)).active is None
    assert judge(Evidence(rails=(Rail("VDD_IN", 5000.0),))).active is None
    assert judge(Evidence(cooling=(Cooling("pwm-fan", 4),))).active is None


def test_cool_device_at_full_clock_is_not_throttled() -> None:
    assert judge(Evidence(gpu=FULL, mode=MAXN, zones=(WARM,))) == Throttling(False, ())


@pytest.mark.parametrize(
    ("gpu", "zone", "active"),
    [(SLOW, HOT, True), (SLOW, WARM, False), (FULL, HOT, False)],
)
def test_slow_clock_counts_only_beside_a_hot_zone(gpu: GpuClock, zone: Zone, active: bool) -> None:
    assert judge(Evidence(gpu=gpu, mode=MAXN, zones=(WARM, zone))).active is active


def test_reason_carries_the_zone_and_both_clocks() -> None:
    seen = judge(Evidence(gpu=SLOW, mode=MAXN, zones=(WARM, HOT)))
    assert seen.reasons == ("thermal: tj at 97.5 C, GPU at 816 of 918 MHz",)


def test_alarms_of_a_rail_are_over_current() -> None:
    rails = (
        Rail("VDD_IN", crit_alarm=True, max_alarm=True),
        Rail("VDD_SOC", crit_alarm=False, max_alarm=True),
        Rail("VDD_CPU", crit_alarm=False, max_alarm=False),
    )
    assert judge(Evidence(rails=rails)).reasons == (
        "over-current: VDD_IN passed its critical limit",
        "over-current: VDD_SOC passed its limit",
    )
    assert judge(Evidence(rails=rails[2:])).active is False


@pytest.mark.parametrize(
    ("name", "state", "active"),
    [
        ("gpu-throttle-alert", 1, True),
        ("gpu-throttle-alert", 0, False),
        ("devfreq-gpu-gpc-0", 18, True),
        ("cpufreq-cpu0", 2, True),
        ("hot-surface-alert", 1, False),
        ("pwm-fan", 9, False),
    ],
)
def test_thermal_framework_is_believed(name: str, state: int, active: bool) -> None:
    calm = Cooling("cpu-throttle-alert", 0)
    assert judge(Evidence(cooling=(calm, Cooling(name, state)))).active is active


@pytest.mark.parametrize(
    ("mode", "cap_mhz"),
    [
        (None, 510),  # what devfreq allows now
        (PowerMode(3, "25W"), 510),  # whose section says nothing of the GPU
        (MAXN, 918),  # no cap: the highest step
        (PowerMode(2, "MODE_30W", 624 * MHZ), 612),  # rounded down to a step
        (PowerMode(2, "MODE_15W", 100 * MHZ), 100),
    ],
)
def test_cap_is_the_mode_s_where_the_mode_is_known(mode: PowerMode | None, cap_mhz: int) -> None:
    """The thermal framework lowers max_freq, so a clock at max_freq may be a slow one."""
    assert clock_cap_hz(replace(FULL, max_hz=510 * MHZ), mode) == cap_mhz * MHZ


def test_clock_held_at_a_lowered_ceiling_is_throttled() -> None:
    held = replace(FULL, now_hz=612 * MHZ, max_hz=612 * MHZ)
    assert judge(Evidence(gpu=held, mode=MAXN, zones=(HOT,))).active is True
    mode = PowerMode(2, "MODE_30W", 624 * MHZ)
    assert judge(Evidence(gpu=held, mode=mode, zones=(HOT,))).active is False
