# SPDX-License-Identifier: Apache-2.0
"""What time it is on a device whose clock may have woken up in 1970.

Nothing signed is ever believed beyond its expiry, so a clock must not be turned back: time never
passes for less than the latest moment that the device has proof of.
"""

from __future__ import annotations

from dataclasses import dataclass

# 2026-11-23: this version did not exist before, so no clock can rightly say so.
BUILT = 1_795_392_000.0
LAST = 253_402_300_799.0  # the end of 9999, where calendars end too
TOLERANCE_S = 300.0  # a clock this much behind is merely not yet set by NTP


@dataclass(frozen=True)
class Now:
    """The time to judge by; `suspect`: the clock itself is behind what is proven."""

    time: float
    suspect: bool


def trusted_now(system: float, proven: float, elapsed: float) -> Now:
    """The system's time, but never before what is proven, and never standing still.

    `proven` is the latest time at which fresh metadata were seen, `elapsed` what has passed since
    by a clock that cannot be set. `proven` grows only together with metadata that are not expired,
    so a clock that runs ahead cannot raise it past their expiry.
    """
    least = max(BUILT, proven) + elapsed
    if not system >= least:  # behind, or not a number
        return Now(min(least, LAST), suspect=not system >= least - TOLERANCE_S)
    return Now(min(system, LAST), suspect=False)
