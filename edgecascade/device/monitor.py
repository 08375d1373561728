# SPDX-License-Identifier: Apache-2.0
"""Watches the device while requests run, so that each answer can say what it cost.

One thread samples power ten times a second and looks for throttling once a second. On a machine
where neither can be known there is no thread, and every answer is None.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

from edgecascade.device.energy import EnergyMark, EnergyMeter
from edgecascade.device.facts import DeviceFacts, facts
from edgecascade.device.power import PowerReader
from edgecascade.device.sysfs import ROOT
from edgecascade.device.throttling import read_over_current_events

POWER_PERIOD_S = 0.1
THROTTLING_PERIOD_S = 1.0


@dataclass(frozen=True)
class Span:
    """The beginning of a request, for `Monitor.end`."""

    started_s: float
    energy: EnergyMark | None
    over_current_events: int | None


@dataclass(frozen=True)
class Cost:
    """What a request took from the whole device; None where that cannot be known.

    Requests that run side by side each see the whole device: their joules overlap.
    """

    joules: float | None = None
    throttled: bool | None = None

    def joules_per_token(self, tokens: int) -> float | None:
        """Energy for each of the answer's tokens."""
        return self.joules / tokens if self.joules is not None and tokens > 0 else None


class Monitor:
    """Energy and throttling between `begin` and `end`; `start` and `close` bound the thread."""

    def __init__(
        self,
        root: Path = ROOT,
        clock: Callable[[], float] = time.monotonic,
        *,
        period_s: float = POWER_PERIOD_S,
    ) -> None:
        self._root = root
        self._clock = clock
        self._period_s = period_s
        self._power = PowerReader(root, clock)
        self._meter = EnergyMeter(self._power.total_mw, clock=clock)
        self._throttled_s: float | None = None  # when it was last seen
        self._looked_s: float | None = None
        self._lock = Lock()
        self._stop = Event()
        self._thread: Thread | None = None
        self._can_tell = False
        self.facts()  # the first look clears alarms of the time before
        self._throttled_s = None

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None

    def start(self) -> None:
        """Begin to sample, if there is anything to sample."""
        if self._thread is None and (self._power.has_total or self._can_tell):
            self._stop.clear()
            self._thread = Thread(target=self._run, name="device-monitor", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def facts(self) -> DeviceFacts:
        """Everything now. Alarms that this read clears still count for the requests that run."""
        now = facts(self._root, self._power)
        with self._lock:
            self._looked_s = self._clock()
            self._can_tell |= now.throttling.active is not None
            if now.throttling.active:
                self._throttled_s = self._looked_s
        return now

    def tick(self) -> None:
        """What the thread does each period; an owner with a loop of its own may call it instead."""
        self._meter.sample()
        if self._can_tell and (
            self._looked_s is None or self._clock() - self._looked_s >= THROTTLING_PERIOD_S
        ):
            self.facts()

    def begin(self) -> Span:
        """A request starts."""
        return Span(self._clock(), self._meter.mark(), read_over_current_events(self._root))

    def end(self, span: Span) -> Cost:
        """A request has ended: its joules, and whether the device was throttled meanwhile."""
        return Cost(self._meter.joules_since(span.energy), self._throttled(span))

    def _throttled(self, span: Span) -> bool | None:
        events = read_over_current_events(self._root)
        before = span.over_current_events
        if events is not None and before is not None and events > before:
            return True
        if self._can_tell:
            return self.facts().throttling.active or self._seen_since(span)
        return None if events is None or before is None else False

    def _seen_since(self, span: Span) -> bool:
        with self._lock:
            return self._throttled_s is not None and self._throttled_s >= span.started_s

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.tick()
