# SPDX-License-Identifier: Apache-2.0
"""Joules: exact on what a trapezoid can follow, unknown on what was not measured.

Times are multiples of 1/1024 s and powers whole watts, so that sums are exact in binary.
"""

from __future__ import annotations

from collections.abc import Callable

from fake_device import Clock
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.device.energy import EnergyMeter

TICK_S = 1 / 1024
STEPS = st.lists(st.tuples(st.integers(16, 1024), st.integers(0, 130)), min_size=1, max_size=40)


def meter(clock: Clock, read: Callable[[], float | None]) -> EnergyMeter:
    return EnergyMeter(read, clock=clock)


def test_constant_power_is_power_times_time(clock: Clock) -> None:
    energy = meter(clock, lambda: 15_000.0)
    start = energy.mark()
    for _ in range(8):
        clock.now_s += 0.5
        energy.sample()
    assert energy.joules_since(start) == 60.0


@given(STEPS)
def test_sampled_corners_give_the_exact_area(steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    watts = 10
    energy = meter(clock, lambda: watts * 1000.0)
    start = energy.mark()
    area = 0.0
    for ticks, following in steps:
        area += (watts + following) / 2 * ticks * TICK_S
        clock.now_s += ticks * TICK_S
        watts = following
        energy.sample()
    assert energy.joules_since(start) == area


@given(STEPS, STEPS)
def test_adjacent_intervals_add_up(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    clock = Clock()
    watts = 10
    energy = meter(clock, lambda: watts * 1000.0)
    whole = energy.mark()
    parts = []
    for steps in (first, second):
        start = energy.mark()
        for ticks, following in steps:
            clock.now_s += ticks * TICK_S
            watts = following
            energy.sample()
        parts.append(energy.joules_since(start) or 0.0)
    assert sum(parts) == energy.joules_since(whole)


def test_device_without_a_rail_has_no_energy(clock: Clock) -> None:
    energy = meter(clock, lambda: None)
    start = energy.mark()
    clock.now_s += 1
    energy.sample()
    assert start is None
    assert energy.joules_since(start) is None


def test_rate_of_reads_is_bounded(clock: Clock) -> None:
    reads = []
    energy = meter(clock, lambda: reads.append(clock.now_s) or 1000.0)
    for _ in range(1024):
        clock.now_s += TICK_S
        energy.sample()
        energy.mark()
    assert len(reads) <= 1 / 0.01


def test_short_interval_between_two_reads_holds_the_power(clock: Clock) -> None:
    energy = meter(clock, lambda: 8000.0)
    energy.sample()
    clock.now_s += 4 * TICK_S
    start = energy.mark()
    clock.now_s += 4 * TICK_S
    assert energy.joules_since(start) == 8 * 4 * TICK_S


def test_energy_never_runs_backwards(clock: Clock) -> None:
    """Held at the old power, a mark may lie above what the next sample shows."""
    watts = 100
    energy = meter(clock, lambda: watts * 1000.0)
    energy.sample()
    clock.now_s += 9 * TICK_S
    start = energy.mark()
    watts = 0
    clock.now_s += 2 * TICK_S
    assert energy.joules_since(start) == 0.0


def test_failed_read_is_spanned_by_the_next_good_one(clock: Clock) -> None:
    power: list[float | None] = [4000.0, None, 8000.0]
    energy = meter(clock, lambda: power.pop(0))
    start = energy.mark()
    clock.now_s += 0.5
    energy.sample()
    clock.now_s += 0.5
    assert energy.joules_since(start) == 6.0


def test_interval_that_ends_unread_is_unknown(clock: Clock) -> None:
    power: list[float | None] = [4000.0, None]
    energy = meter(clock, lambda: power.pop(0))
    start = energy.mark()
    clock.now_s += 0.5
    assert energy.joules_since(start) is None


def test_long_silence_makes_only_the_intervals_across_it_unknown(clock: Clock) -> None:
    energy = meter(clock, lambda: 4000.0)
    across = energy.mark()
    clock.now_s += 2.5
    after = energy.mark()
    clock.now_s += 1
    assert energy.joules_since(across) is None
    assert energy.joules_since(after) == 4.0
