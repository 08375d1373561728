# SPDX-License-Identifier: Apache-2.0
"""What a device reports about an order: one retained document per order and device.

The agent signs it (reports.py) and publishes it at every change; the controller only counts. The
words of `state` are those of AWS IoT Jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from edgecascade.fleet import strict
from edgecascade.service import wire

SCHEMA = 1
MAX_JOB_BYTES = 3600  # signed it still fits every carrier: AWS IoT Jobs takes 10 KB in pieces of 1
MAX_TEXT = 1000
SHORTER = (MAX_TEXT, 250, 60, 0)  # characters of a text, where a document would be too large

JobState = Literal["QUEUED", "IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED", "CANCELED"]
STATES: tuple[JobState, ...] = get_args(JobState)
ENDED: frozenset[JobState] = frozenset({"SUCCEEDED", "FAILED", "REJECTED", "CANCELED"})


@dataclass(frozen=True)
class Job:
    """One device's progress with one order.

    `group` and `release` are the order's; a device that could not believe an order names none as
    its release. `version` grows with every report of a device, so that an old one is told from a
    new one. `phase` is the updater's own word. `evidence` says why it ended as it did: `reason` (a
    stable word), `message`, and whatever was measured.
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
    evidence: dict[str, Any] = field(default_factory=dict)
    ts: float = 0.0
    group: str = ""
    release: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come, unless a new order does."""
        return self.state in ENDED

    def to_bytes(self) -> bytes:
        """What is signed; evidence that would make it too large is left out or cut."""
        whole = wire.encode({"schema": SCHEMA, **asdict(self)})
        for most in SHORTER:
            if len(whole) <= MAX_JOB_BYTES:
                break
            short = {
                key: str(self.evidence[key])[:most]
                for key in ("reason", "message")
                if key in self.evidence
            }
            whole = wire.encode({"schema": SCHEMA, **asdict(self), "evidence": short})
        return whole


def first_to_forget(jobs: Mapping[str, Job]) -> str:
    """Of too many reports, by order and the oldest first, the one to drop.

    Anybody can send a device orders that it refuses: they must not push out what it really did.
    """
    return next((name for name, job in jobs.items() if not job.release), next(iter(jobs)))


def read_job(payload: bytes) -> Job | None:
    """The report in these bytes; None for what is not one."""
    try:
        job = strict.parse(
            Job, payload, "report", schema=SCHEMA, limit=MAX_JOB_BYTES, defaults=True
        )
    except strict.BadDocument:
        return None
    texts = [value for value in vars(job).values() if isinstance(value, str)]
    short = all(len(text) <= MAX_TEXT for text in texts)
    return job if short and min(job.seq, job.version) >= 0 and 0 <= job.progress <= 1 else None
