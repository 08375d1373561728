# SPDX-License-Identifier: Apache-2.0
"""Joules from samples of power."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

# An INA3221 finishes a conversion of its three channels every few milliseconds.
MIN_INTERVAL_S = 0.01
# Longer than this between two samples, and what the device drew in between is a guess.
MAX_GAP_S = 2.0


@dataclass(frozen=True)
class EnergyMark:
    """A point in time on the meter's own scale; only differences of marks mean something."""

    joules: float
    gaps: int


class EnergyMeter:
    """Integrates power over time by the trapezoid rule.

    It samples when it is told to and has no thread: whoever owns it calls `sample` in a loop, more
    often than every MAX_GAP_S. `mark` and `joules_since` take samples of their own, so that a short
    interval has one at each end. Safe to call from any thread.
    """

    def __init__(
        self,
        read_mw: Callable[[], float | None],
        *,
        clock: Callable[[], float] = time.monotonic,
        min_interval_s: float = MIN_INTERVAL_S,
        max_gap_s: float = MAX_GAP_S,
    ) -> None:
        self._read_mw = read_mw
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._max_gap_s = max_gap_s
        self._lock = Lock()
        self._tried_s: float | None = None
        self._last: tuple[float, float] | None = None  # seconds, watts of the last good sample
        self._joules = 0.0  # up to the last good sample
        self._gaps = 0

    def sample(self) -> None:
        """Read the power once, unless it was read within the shortest interval."""
        with self._lock:
            self._sample()

    def mark(self) -> EnergyMark | None:
        """Begin an interval; None where the power cannot be read now."""
        with self._lock:
            self._sample()
            return self._now()

    def joules_since(self, mark: EnergyMark | None) -> float | None:
        """The energy drawn since a mark; None if any part of it was not measured."""
        now = self.mark()
        if mark is None or now is None or now.gaps != mark.gaps:
            return None
        return max(0.0, now.joules - mark.joules)

    def _sample(self) -> None:
        now_s = self._clock()
        if self._tried_s is not None and now_s - self._tried_s < self._min_interval_s:
            return
        self._tried_s = now_s
        power_mw = self._read_mw()
        # A read that failed is no sample: the next good one spans it, if it comes soon enough.
        if power_mw is None:
            return
        watts = power_mw / 1000
        if self._last is not None:
            last_s, last_watts = self._last
            if now_s - last_s <= self._max_gap_s:
                self._joules += (watts + last_watts) / 2 * (now_s - last_s)
            else:
                self._gaps += 1
        self._last = (now_s, watts)

    def _now(self) -> EnergyMark | None:
        """The scale at this moment: between two samples the power holds its last value."""
        if self._last is None or self._last[0] != self._tried_s:
            return None
        last_s, watts = self._last
        return EnergyMark(self._joules + watts * (self._clock() - last_s), self._gaps)
