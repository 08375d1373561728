# SPDX-License-Identifier: Apache-2.0
"""What a device believes of a repository, without a file, a socket or a clock.

python-tuf checks signatures, thresholds, expiry and versions against what it has stored. What it
has stored may be lost, so the versions once seen are kept apart, in the floor, and checked here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from edgecascade.errors import UpdateRefused
from edgecascade.files import canonical_json
from edgecascade.fleet import release as releases
from edgecascade.fleet import strict
from edgecascade.fleet.clock import Now
from edgecascade.fleet.orders import OrderKeys
from edgecascade.fleet.release import Release
from edgecascade.fleet.sealed import seal, unseal
from edgecascade.service import wire

if TYPE_CHECKING:
    from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

ORDER_KEYS = "orders/keys.json"  # the target that names who may sign orders
MAX_BELIEF_BYTES = 64 << 10
DAY_S = 86_400.0


@dataclass(frozen=True)
class Seen:
    """The newest metadata a device has accepted. `online` names the timestamp and snapshot keys."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    online: str = ""
    time: float = 0.0  # when, by the device's trusted clock or the signer's, whichever is later

    def merged(self, other: Seen) -> Seen:
        """The higher of both, number by number.

        Whoever stole the online keys could sign the highest version there is, dated far ahead. So
        a root that replaces them also replaces what was seen under them (TUF 5.3.11).
        """
        older, newer = sorted((self, other), key=lambda seen: seen.root)
        kept = replace(newer, targets=max(older.targets, newer.targets))
        if newer.root > older.root and newer.online != older.online:
            return kept
        return replace(
            kept,
            timestamp=max(older.timestamp, newer.timestamp),
            snapshot=max(older.snapshot, newer.snapshot),
            time=max(older.time, newer.time),
        )


@dataclass(frozen=True)
class Belief:
    """What is kept of the last good refresh, for when the repository is out of reach."""

    fresh_until: float  # after that, somebody may be hiding news
    keys_until: float
    keys: OrderKeys

    def to_bytes(self) -> bytes:
        """The file's content, with its checksum."""
        return seal("belief", wire.encode(asdict(self)))

    @staticmethod
    def parse(data: bytes) -> Belief | None:
        """The file's content; None for a damaged one, which costs a refresh."""
        text = unseal("belief", data)
        if text is None:
            return None
        try:
            return strict.read(Belief, strict.json_object(text, "belief"), "belief")
        except strict.BadDocument:
            return None


def seen(root: Root, timestamp: Timestamp, snapshot: Snapshot, targets: Targets, now: Now) -> Seen:
    """What a refresh at `now` has shown.

    The signer's own date helps a device without a clock. It counts up to the first expiry, and
    where the clock looks sound for a day: a stolen timestamp key must not push devices far ahead,
    where all that is honest has expired.
    """
    signed_at = timestamp.unrecognized_fields.get("signed_at", 0)
    dated = float(signed_at) if type(signed_at) in (int, float) else 0.0
    first_expiry = min(fresh_until(root, timestamp, snapshot), targets.expires.timestamp())
    latest = first_expiry if now.suspect else min(first_expiry, now.time + DAY_S)
    return Seen(
        root=root.version,
        timestamp=timestamp.version,
        snapshot=snapshot.version,
        targets=targets.version,
        online=online_keys(root),
        time=max(now.time, min(dated, latest)),
    )


def fresh_until(root: Root, timestamp: Timestamp, snapshot: Snapshot) -> float:
    """When a device must have heard from the repository again."""
    return min(signed.expires.timestamp() for signed in (root, timestamp, snapshot))


def online_keys(root: Root) -> str:
    """One word for the keys that sign timestamp and snapshot."""
    ids = [sorted(root.roles[role].keyids) for role in ("timestamp", "snapshot")]
    return hashlib.sha256(canonical_json(ids)).hexdigest()


def replaces_online_keys(root: Root, floor: Seen) -> bool:
    """Whether a later root took away the keys under which the floor was seen."""
    return bool(root.version > floor.root and online_keys(root) != floor.online)


def check_floor(floor: Seen, now: Seen) -> None:
    """Refuse metadata older than what was seen before.

    Raises:
        UpdateRefused: with reason "rollback".
    """
    if now.root < floor.root:
        _refuse_older("root", now.root, floor.root)
    roles: Iterable[str] = ("timestamp", "snapshot", "targets")
    if now.root > floor.root and now.online != floor.online:
        roles = ("targets",)  # see Seen.merged
    for role in roles:
        if getattr(now, role) < getattr(floor, role):
            _refuse_older(role, getattr(now, role), getattr(floor, role))


def check_target(found: TargetFile | None, name: str, version: str, sha256: str) -> TargetFile:
    """The repository's entry for the release that an order names.

    Raises:
        UpdateRefused: when it has none, or another one.
    """
    if found is None:
        raise UpdateRefused(
            f"the repository has no release {name} {version}; publish it before ordering it",
            reason="unknown-release",
        )
    if found.hashes.get("sha256") != sha256:
        raise UpdateRefused(
            f"the order names release {sha256} of {name} {version}, the repository signed "
            f"{found.hashes.get('sha256')}",
            reason="wrong-release",
        )
    if found.length > releases.MAX_RELEASE_BYTES:
        raise UpdateRefused(
            f"release {name} {version} has {found.length} bytes; at most "
            f"{releases.MAX_RELEASE_BYTES} are read",
            reason="too-large",
        )
    return found


def read_release(data: bytes, name: str, version: str) -> Release:
    """A release whose bytes are trusted; it must be what it was filed under.

    Raises:
        UpdateRefused: for another one, or one this version does not understand.
    """
    found = releases.parse(data)
    if (found.name, found.version) != (name, version):
        raise UpdateRefused(
            f"release {name} {version} says that it is {found.name} {found.version}",
            reason="wrong-release",
        )
    return found


def _refuse_older(role: str, found: int, floor: int) -> None:
    raise UpdateRefused(
        f"{role} metadata has version {found}, this device has seen {floor}: an old copy of the "
        "repository, or an attack",
        reason="rollback",
    )
