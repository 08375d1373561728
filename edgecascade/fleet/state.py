# SPDX-License-Identifier: Apache-2.0
"""What a device remembers of its bundles and orders: `DeviceState`, and its one file.

The file carries a checksum of its content, so that a torn or rotten one is never believed. Nothing
here touches a disk: bytes in, a checked state out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from edgecascade.errors import UpdateFailed
from edgecascade.fleet import strict
from edgecascade.fleet.jobs import JobState
from edgecascade.fleet.orders import Order
from edgecascade.fleet.sealed import seal, unseal
from edgecascade.service import wire

SCHEMA = 1
MAX_STATE_BYTES = 1 << 20
MAX_VERDICTS = 32  # orders whose outcome is remembered
MAX_EVIDENCE_BYTES = 8 << 10


class Phase(str, Enum):
    """Where an update stands; each is stored before it begins, and can be begun again."""

    OFFERED = "offered"  # taken; asks the disk for room
    WAITING = "waiting"  # for its window, or until a failed attempt may be repeated
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"  # every blob is hashed before anything names it
    STAGING = "staging"  # links the bundle's folder
    REHEARSING = "rehearsing"  # runs beside the old bundle, where memory has room for both
    DRAINING = "draining"  # the service finishes its requests
    PROBATION = "probation"  # active, but not yet kept


ON_TRIAL = frozenset({Phase.REHEARSING, Phase.PROBATION})


@dataclass(frozen=True)
class Slot:
    """A bundle as a device holds it."""

    name: str
    version: str
    seq: int  # the release's, which only grows
    release: str  # SHA-256 of the release document, kept as releases/<release>
    manifest: str  # SHA-256 of the bundle's manifest.json, which names its folder


@dataclass(frozen=True)
class Update:
    """The update in progress."""

    order: Order
    target: Slot
    phase: Phase
    boots: int = 0  # attempts of this trial, counted before each
    failures: int = 0  # of the work before the trial
    not_before: float = 0.0
    proven: bool = False  # a child process has loaded it and answered as it must
    paused: bool = False
    behind: Slot | None = None  # on probation: what was the previous one until the switch


@dataclass(frozen=True)
class Verdict:
    """How an order ended. `condemned`: the release itself failed here, not the road to it.

    `release` is what was to run: what the order names (`ordered`), or what it goes back to.
    """

    order: str
    key: str  # the sequence of orders it belongs to
    seq: int
    state: JobState
    evidence: dict[str, Any] = field(default_factory=dict)
    release: str = ""
    condemned: bool = False
    bundle_from: str = ""
    bundle_to: str = ""
    ordered: str = ""


@dataclass(frozen=True)
class DeviceState:
    """All that survives a power cut, replaced as a whole."""

    revision: int = 0  # grows with every store
    active: Slot | None = None  # what the service runs
    previous: Slot | None = None  # what it goes back to
    golden: Slot | None = None  # the first that was ever kept; never collected
    update: Update | None = None
    seqs: dict[str, int] = field(default_factory=dict)  # highest order seen, by Order.key
    floors: dict[str, int] = field(default_factory=dict)  # highest release kept, by name
    verdicts: tuple[Verdict, ...] = ()  # the latest last

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All bundles that must stay, each once."""
        moving = (self.update.target, self.update.behind) if self.update else ()
        every = (self.active, self.previous, self.golden, *moving)
        return tuple(dict.fromkeys(slot for slot in every if slot is not None))

    def verdict(self, order: str) -> Verdict | None:
        """What became of an order, if it is remembered."""
        return next((v for v in reversed(self.verdicts) if v.order == order), None)

    def with_verdict(self, verdict: Verdict) -> DeviceState:
        """The state with one more outcome; the oldest is forgotten."""
        others = tuple(v for v in self.verdicts if v.order != verdict.order)
        return replace(self, verdicts=(*others, verdict)[-MAX_VERDICTS:])

    def revised(self, revision: int) -> DeviceState:
        """The same, about to be stored."""
        return replace(self, revision=revision)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return seal("state", wire.encode({"schema": SCHEMA, "state": self}))


def read_state(data: bytes) -> DeviceState:
    """The state in a file's content.

    Raises:
        UpdateFailed: for anything but what `DeviceState.to_bytes` writes.
    """
    text = unseal("state", data)
    if text is None:
        raise UpdateFailed("the device's state file is damaged: its checksum does not fit")
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise UpdateFailed(
                f"the device's state file has schema {document['schema']!r}, this version reads "
                f"{SCHEMA}; install the version that wrote it"
            )
        update = document["state"]["update"]
        if update is not None:
            update["phase"] = Phase(update["phase"])
        return strict.read(DeviceState, document["state"], "the device's state")
    except (ValueError, TypeError, KeyError) as error:
        raise UpdateFailed(f"the device's state file holds something else: {error}") from None


def slot_to_bytes(slot: Slot) -> bytes:
    """The golden slot's own file, which stands in where the state file is lost."""
    return seal("slot", wire.encode(slot))


def read_slot(data: bytes) -> Slot:
    """The slot in a file's content.

    Raises:
        UpdateFailed: for anything but what `slot_to_bytes` writes.
    """
    text = unseal("slot", data)
    try:
        if text is not None:
            return strict.read(Slot, json.loads(text), "a slot")
        problem = "its checksum does not fit"
    except ValueError as error:
        problem = str(error)
    raise UpdateFailed(f"the golden bundle's file is damaged: {problem}")


def cut_evidence(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence that fits in the state file and in a report."""
    kept: dict[str, Any] = {}
    for key, value in evidence.items():
        plain = value if not isinstance(value, float) or math.isfinite(value) else str(value)
        kept[key] = plain[:1000] if isinstance(plain, str) else plain
        if len(json.dumps(kept)) > MAX_EVIDENCE_BYTES:
            kept[key] = "too long to keep"
    return kept
