# SPDX-License-Identifier: Apache-2.0
"""What a device reports about an order: one retained document per order and device.

The agent publishes it at every change; the controller only counts. The words of `state` are those
of AWS IoT Jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from edgecascade.service import wire

SCHEMA = 1
MAX_JOB_BYTES = 32 << 10  # a larger document is not one of ours
MAX_TEXT = 1000

JobState = Literal["QUEUED", "IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED", "CANCELED"]
STATES: tuple[JobState, ...] = get_args(JobState)
ENDED: frozenset[JobState] = frozenset({"SUCCEEDED", "FAILED", "REJECTED", "CANCELED"})


@dataclass(frozen=True)
class Job:
    """One device's progress with one order.

    `version` grows with every report of this job, so that an old one is told from a new one.
    `phase` is the updater's own word. `evidence` says why it ended as it did: `reason` (a stable
    word), `message`, and whatever was measured.
    """

    order: str
    seq: int
    device: str
    state: JobState
    phase: str = ""
    progress: float = 0.0
    version: int = 1
    bundle_from: str = ""
    bundle_to: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    ts: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come, unless a new order does."""
        return self.state in ENDED

    def to_bytes(self) -> bytes:
        """As published; evidence that would make the document too large is left out."""
        whole = wire.encode({"schema": SCHEMA, **asdict(self)})
        if len(whole) <= MAX_JOB_BYTES:
            return whole
        short = {
            key: str(self.evidence[key])[:MAX_TEXT]
            for key in ("reason", "message")
            if key in self.evidence
        }
        return wire.encode({"schema": SCHEMA, **asdict(self), "evidence": short})


def read_job(payload: bytes) -> Job | None:
    """A report as received; None for what is not one."""
    if len(payload) > MAX_JOB_BYTES:
        return None
    try:
        body = wire.decode(payload)
    except wire.BadJson:
        return None
    if not isinstance(body, dict) or body.pop("schema", None) != SCHEMA:
        return None
    try:
        job = Job(**body)
    except TypeError:
        return None
    return job if _sound(job) else None


def _sound(job: Job) -> bool:
    texts = (job.order, job.device, job.phase, job.bundle_from, job.bundle_to)
    return (
        all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts)
        and all(type(number) is int and number >= 0 for number in (job.seq, job.version))
        and isinstance(job.state, str)
        and job.state in STATES
        and _number(job.progress)
        and 0 <= job.progress <= 1
        and _number(job.ts)
        and isinstance(job.evidence, dict)
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
