# SPDX-License-Identifier: Apache-2.0
"""What the updater is told (events) and what it asks for (effects).

Every effect can be performed again. Those with an arrow answer with an event, which names the order
it belongs to, so that an answer which comes too late is known as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgecascade.fleet.jobs import JobState
from edgecascade.fleet.orders import Order
from edgecascade.fleet.state import Slot


@dataclass(frozen=True)
class Booted:
    """The device's process has started. `note` says what was lost or repaired on the way."""

    note: str = ""


@dataclass(frozen=True)
class Ordered:
    """An order whose signature, expiry and cohort were checked; `target` is what it installs.

    `refusal` says why this device cannot have it, such as another SoC than the release requires.
    """

    order: Order
    target: Slot | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True)
class Measured:
    """Answer to `Measure`. `spare_bytes` is what the previous bundle alone holds."""

    order: str
    need_bytes: int
    free_bytes: int
    spare_bytes: int = 0


@dataclass(frozen=True)
class Downloaded:
    """All blobs are in the store."""

    order: str


@dataclass(frozen=True)
class Verified:
    """Answer to `Verify`; `damaged` blobs were taken out of the store."""

    order: str
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Staged:
    """The bundle's folder is complete and durable; `room_for_two`: both bundles fit in memory.

    `known`: it is the active one under other options, and must show no more than that did.
    """

    order: str
    room_for_two: bool = False
    known: bool = False


@dataclass(frozen=True)
class Drained:
    """The service has ended."""

    order: str


@dataclass(frozen=True)
class Tried:
    """Answer to `Try`: what the child process found."""

    order: str
    ok: bool
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Soaked:
    """Answer to `Soak`: how the service did on the new bundle."""

    order: str
    ok: bool
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """Answer to `Check`: whether the bundle is whole; `reason` says what is not."""

    manifest: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Failed:
    """An effect could not be done. `final`: trying again would not help."""

    order: str
    reason: str  # a stable word
    message: str = ""
    final: bool = False


Event = (
    Booted
    | Ordered
    | Ticked
    | Measured
    | Downloaded
    | Verified
    | Staged
    | Drained
    | Tried
    | Soaked
    | Checked
    | Failed
)


@dataclass(frozen=True)
class Report:
    """Publish where an order stands. An order that was not believed has no `release`."""

    order: str
    seq: int
    state: JobState
    phase: str = ""
    group: str = ""
    release: str = ""
    bundle_from: str = ""
    bundle_to: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """Find how many bytes an update needs and the disk has -> Measured."""

    order: str
    target: Slot


@dataclass(frozen=True)
class Download:
    """Fetch the blobs that the store lacks, within the order's limits -> Downloaded or Failed."""

    order: Order
    target: Slot


@dataclass(frozen=True)
class Halt:
    """Stop the update's download or trial; what is on the disk stays."""


@dataclass(frozen=True)
class Verify:
    """Hash every blob of the target -> Verified."""

    order: str
    target: Slot


@dataclass(frozen=True)
class Stage:
    """Make the bundle's folder -> Staged."""

    order: str
    target: Slot


@dataclass(frozen=True)
class Try:
    """Run the bundle in a child process against its health checks -> Tried."""

    order: str
    target: Slot


@dataclass(frozen=True)
class Drain:
    """Let the service finish its requests and end -> Drained."""

    order: str


@dataclass(frozen=True)
class Start:
    """Run the service on this bundle, if it does not already; None: on none."""

    slot: Slot | None


@dataclass(frozen=True)
class Soak:
    """Run the service on the new bundle and watch it for the release's soak time -> Soaked."""

    order: str
    target: Slot


@dataclass(frozen=True)
class Check:
    """Find whether a bundle is whole, blob by blob -> Checked."""

    slot: Slot


@dataclass(frozen=True)
class RaiseFloor:
    """Keep the highest orders and releases where the loss of the state file does not reach."""

    seqs: Mapping[str, int]
    floors: Mapping[str, int]


@dataclass(frozen=True)
class Collect:
    """Remove every blob, folder and document that none of these bundles has."""

    keep: tuple[Slot, ...]


@dataclass(frozen=True)
class Defer:
    """Offer this order again when the update in progress has ended."""

    event: Ordered


@dataclass(frozen=True)
class Wake:
    """Tick at this time, or soon after."""

    at: float


Effect = (
    Report
    | Measure
    | Download
    | Halt
    | Verify
    | Stage
    | Try
    | Drain
    | Start
    | Soak
    | Check
    | RaiseFloor
    | Collect
    | Defer
    | Wake
)
