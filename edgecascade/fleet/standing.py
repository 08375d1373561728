# SPDX-License-Identifier: Apache-2.0
"""How a device stands, in its own words: one retained document per device, signed like a report.

Who owns the broker can repeat an old one or hold a new one back. So it says when it was said, comes
anew every few minutes, and names the end of what the device knows: an operator who has heard
nothing for a while knows that much, and one who is shown an old word finds it out by himself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgecascade.fleet import strict
from edgecascade.fleet.clock import LAST
from edgecascade.fleet.orders import ID
from edgecascade.service import wire

SCHEMA = 1
MAX_STANDING_BYTES = 3600
SHORTER = (500, 120, 30, 0)  # bytes of a text
WHOLE = ("device", "status")
HEARTBEAT_S = 300.0  # between two words when nothing changes
SILENT_S = 900.0  # three heartbeats: who has not spoken for so long is not there
OFFLINE = "offline"


@dataclass(frozen=True)
class Refused:
    """The last order that a device did not obey, and why."""

    order: str
    reason: str
    message: str


@dataclass(frozen=True)
class Standing:
    """One word of a device about itself; times are seconds since 1970, by the device's clock.

    `boot` and `number` order the words of a device, whatever its clock does. `fresh_until`: later
    than that, the metadata that the device has are expired. `offline` is a goodbye.
    """

    device: str
    boot: int
    status: Literal["online", "updating", "offline"] = "online"
    number: int = 0
    ts: float = 0.0
    bundle: str = ""
    manifest: str = ""
    order: str = ""
    phase: str = ""
    service: str = ""
    update_stale: bool = False
    fresh_until: float = 0.0
    repository: str = ""
    clock_suspect: bool = False
    refused: Refused | None = None

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.device):
            raise ValueError(f"device is {self.device!r:.80}; expected {ID.pattern}")
        for name in ("boot", "number"):
            if not 0 <= getattr(self, name) <= wire.MAX_INTEGER:
                raise ValueError(f"{name} is {getattr(self, name)}")
        for name in ("ts", "fresh_until"):
            if not (math.isfinite(value := getattr(self, name)) and 0 <= value <= LAST):
                raise ValueError(f"{name} is {value:g}; expected seconds since 1970")

    @property
    def turn(self) -> tuple[int, int]:
        """What grows with every word."""
        return self.boot, self.number

    def to_bytes(self) -> bytes:
        """What is signed; texts are cut where it would be too large."""
        for most in SHORTER:
            body = wire.encode({"schema": SCHEMA, **_cut(asdict(self), most)})
            if len(body) <= MAX_STANDING_BYTES:
                break
        return body

    @staticmethod
    def parse(data: bytes) -> Standing:
        """The word in the bytes.

        Raises:
            BadDocument: for anything else.
        """
        return strict.parse(Standing, data, "standing", schema=SCHEMA, limit=MAX_STANDING_BYTES)

    def expired(self, now: float) -> bool:
        """Whether the device has had no news for as long as its metadata were good."""
        return self.update_stale or now >= self.fresh_until

    def present(self, now: float) -> bool:
        """Whether the device is there. A word without a date counts, and `undated` says so."""
        late = now - self.ts >= SILENT_S and not self.clock_suspect
        return self.status != OFFLINE and not late


def _cut(body: dict[str, Any], most: int) -> dict[str, Any]:
    """The same with texts of at most so many bytes, and nothing that UTF-8 has no form for."""
    short = dict(body)
    for name, value in body.items():
        if isinstance(value, dict):
            short[name] = _cut(value, most)
        elif isinstance(value, str) and name not in WHOLE:
            short[name] = value.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")
    return short
