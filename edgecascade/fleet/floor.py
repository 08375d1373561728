# SPDX-License-Identifier: Apache-2.0
"""The highest numbers a device has seen, which outlive every other file of it.

Whoever can make a device lose its state must not make it take an old order or an old release again.
So the numbers are kept twice, each copy with its checksum; the second is touched only when the
first is durable.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgecascade.errors import UpdateFailed
from edgecascade.fleet import strict
from edgecascade.fleet.fs import Files, replace_file
from edgecascade.fleet.sealed import seal, unseal
from edgecascade.fleet.trust import Seen
from edgecascade.service import wire

log = logging.getLogger(__name__)

COPIES = ("floor-a", "floor-b")
MAX_FLOOR_BYTES = 1 << 20
_ONE = threading.Lock()  # orders are seen on one thread, metadata on another


@dataclass(frozen=True)
class Floor:
    """What must not be gone below: `orders` by key, `releases` by bundle, and metadata."""

    orders: dict[str, int] = field(default_factory=dict)
    releases: dict[str, int] = field(default_factory=dict)
    metadata: Seen = field(default_factory=Seen)

    def to_bytes(self) -> bytes:
        """A copy's content."""
        return seal("floor", wire.encode(self))

    def raised(self, other: Floor) -> Floor:
        """The higher of both, number by number."""
        return Floor(
            _highest(self.orders, other.orders),
            _highest(self.releases, other.releases),
            self.metadata.merged(other.metadata),
        )


def read_floor(files: Files) -> Floor:
    """The highest numbers of all copies that are whole."""
    floor = Floor()
    for path in COPIES:
        floor = floor.raised(_copy(files, path))
    return floor


def raise_floor(
    files: Files,
    *,
    orders: Mapping[str, int] | None = None,
    releases: Mapping[str, int] | None = None,
    metadata: Seen | None = None,
) -> None:
    """Raise what is lower; durable when this returns. Copies that were damaged are mended."""
    floor = Floor(dict(orders or {}), dict(releases or {}), metadata or Seen())
    with _ONE:
        copies = {path: _copy(files, path) for path in COPIES}
        for copy in copies.values():
            floor = floor.raised(copy)
        for path, copy in copies.items():
            if copy != floor:
                replace_file(files, path, floor.to_bytes())


def _copy(files: Files, path: str) -> Floor:
    data = files.read(path, MAX_FLOOR_BYTES)
    if data is None:
        return Floor()
    text = unseal("floor", data)
    if text is None:
        log.error("%s is damaged; its other copy stands in", path)
        return Floor()
    try:
        return strict.read(Floor, json.loads(text), path, defaults=True)
    except strict.BadDocument as error:  # never taken for nothing: a floor does not sink
        raise UpdateFailed(f"{error}; install the version that wrote it", reason="floor") from None


def _highest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in sorted({*one, *other})}
