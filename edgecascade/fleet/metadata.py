# SPDX-License-Identifier: Apache-2.0
"""The signed metadata of a repository, as its operator writes them (The Update Framework).

    root       who signs what; the one file a device is given when it is set up
    targets    releases and order keys, by hash; may delegate a bundle's name to other keys
    snapshot   which versions of targets belong together
    timestamp  which snapshot is current; the only file that is ever replaced

Every other file has its version in its name and is written before the timestamp names it, so a
writer that is killed leaves the repository as it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from edgecascade.errors import FleetError
from edgecascade.files import replace_file
from edgecascade.fleet.keys import Key, KeyFolders
from edgecascade.fleet.needs import fleet_extra

with fleet_extra():
    from securesystemslib.exceptions import StorageError
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import (
        DelegatedRole,
        Delegations,
        Metadata,
        MetaFile,
        Root,
        Snapshot,
        Targets,
        Timestamp,
    )

TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
ORDERS = "orders"
DAYS = "expiry_days"  # how long each signature of the role is good for; in the signed part
RENEW_BELOW = 0.5  # of that time left


@dataclass(frozen=True)
class RolePlan:
    """How many keys a role has, how many must sign, and for how long."""

    keys: int
    threshold: int
    days: float = 0.0


Profile = Mapping[str, RolePlan]

PROFILES: dict[str, Profile] = {
    # One stolen key signs no bundle and replaces no other key; one lost root key is no loss.
    "full": {
        "root": RolePlan(3, 2, 365),
        "targets": RolePlan(2, 2, 90),
        "snapshot": RolePlan(1, 1, 7),
        "timestamp": RolePlan(1, 1, 1),
        ORDERS: RolePlan(2, 1),
    },
    # For one person with some robots: nothing has to run every day.
    "small": {
        "root": RolePlan(2, 1, 730),
        "targets": RolePlan(1, 1, 365),
        "snapshot": RolePlan(1, 1, 60),
        "timestamp": RolePlan(1, 1, 30),
        ORDERS: RolePlan(1, 1),
    },
}


class SignedMetadata:
    """All current metadata below `folder`, and how to replace them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root: Metadata[Root] = _read(folder / f"{_latest_root(folder)}.root.json")
        self.timestamp: Metadata[Timestamp] = _read(folder / "timestamp.json")
        version = self.timestamp.signed.snapshot_meta.version
        self.snapshot: Metadata[Snapshot] = _read(folder / f"{version}.snapshot.json")
        meta = self.snapshot.signed.meta
        self.targets: Metadata[Targets] = _read(
            folder / f"{meta['targets.json'].version}.targets.json"
        )
        self.delegated: dict[str, Metadata[Targets]] = {
            role: _read(folder / f"{meta[f'{role}.json'].version}.{role}.json")
            for role in self.delegated_roles
        }

    @property
    def delegated_roles(self) -> dict[str, DelegatedRole]:
        """The roles that sign for one bundle's name."""
        delegations = self.targets.signed.delegations
        return dict(delegations.roles or {}) if delegations else {}

    def keyids(self, role: str) -> list[str]:
        """The keys that may sign for a role."""
        return list(self._role(role).keyids)

    def expiries(self) -> dict[str, float]:
        """When each role's signature ends."""
        return {role: md.signed.expires.timestamp() for role, md in self._all().items()}

    def due(self, now: float) -> list[str]:
        """The roles that should be signed again, because half of their time is over."""
        return [
            role
            for role, md in self._all().items()
            if role != "timestamp"
            and md.signed.expires.timestamp() - now < RENEW_BELOW * 86_400 * _days(md)
        ]

    def can_sign(self, role: str, keys: KeyFolders) -> bool:
        """Whether enough keys of a role are at hand."""
        have = [key for key in keys.keys(role) if key.keyid in self.keyids(role)]
        return len(have) >= int(self._role(role).threshold)

    def check_keys(self, roles: Iterable[str], keys: KeyFolders) -> None:
        """Refuse what could not be signed, before anything is done.

        Raises:
            FleetError: naming the role and what is missing.
        """
        for role in roles:
            self._signers(role, keys)

    def commit(
        self,
        changed: Iterable[str],
        keys: KeyFolders,
        now: float,
        *,
        besides: Mapping[str, list[Key]] | None = None,
    ) -> None:
        """Sign the changed roles and all that name them; the last write makes it current.

        `besides` gives keys that sign too, though the root does not, or no longer, name them.

        Raises:
            FleetError: when a role's keys are not at hand; then nothing was written.
        """
        wanted = set(changed)
        below = {"targets", *self.delegated} & wanted
        if below:
            wanted.add("snapshot")
        wanted.add("timestamp")
        wanted.discard("root")
        signers = {role: self._signers(role, keys) for role in wanted}
        for role, more in (besides or {}).items():
            if role in signers:
                signers[role] = [*signers[role], *more]
        self.timestamp.signed.unrecognized_fields["signed_at"] = int(now)
        self.write(signers, now)

    def write(self, signers: Mapping[str, list[Key]], now: float) -> None:
        """Sign these roles with these keys, whoever may; each names the ones signed before it."""
        data: dict[str, bytes] = {}
        for role in [*self.delegated, "targets"]:
            if role in signers:
                data[role] = self.sign(role, signers[role], now)
        if "snapshot" in signers:
            meta = self.snapshot.signed.meta
            for role, text in data.items():
                meta[f"{role}.json"] = _meta(self._all()[role].signed.version, text)
            data["snapshot"] = self.sign("snapshot", signers["snapshot"], now)
            version = self.snapshot.signed.version
            self.timestamp.signed.snapshot_meta = _meta(version, data["snapshot"])
        data["timestamp"] = self.sign("timestamp", signers["timestamp"], now)
        for role, text in data.items():
            if role != "timestamp":
                replace_file(self.folder / f"{self._all()[role].signed.version}.{role}.json", text)
        replace_file(self.folder / "timestamp.json", data["timestamp"])

    def commit_root(self, keys: KeyFolders, now: float, before: list[Key]) -> None:
        """Sign the changed root: enough of the keys `before` the change, and enough of those after.

        Raises:
            FleetError: when they are not at hand; then nothing was written.
        """
        old: Metadata[Root] = _read(self.folder / f"{self.root.signed.version}.root.json")
        role = old.signed.roles["root"]
        former = [key for key in before if key.keyid in role.keyids]
        if len(former) < role.threshold:
            _lacking("root", role.threshold, len(former))
        every = {key.keyid: key for key in [*former, *self._signers("root", keys)]}
        text = self.sign("root", list(every.values()), now)
        replace_file(self.folder / f"{self.root.signed.version}.root.json", text)

    def sign(self, role: str, signers: list[Key], now: float) -> bytes:
        """The next version of a role's metadata."""
        metadata = self._all()[role]
        metadata.signed.version += 1
        metadata.signed.expires = expiry(now, _days(metadata))
        metadata.signatures.clear()
        for key in signers:
            metadata.sign(key.signer, append=True)
        return bytes(metadata.to_bytes())

    def _all(self) -> dict[str, Metadata[Any]]:
        top: dict[str, Metadata[Any]] = {
            "root": self.root,
            "targets": self.targets,
            "snapshot": self.snapshot,
            "timestamp": self.timestamp,
        }
        return {**top, **self.delegated}

    def _role(self, role: str) -> Any:
        if role in TOP_ROLES:
            return self.root.signed.roles[role]
        return self.delegated_roles[role]

    def _signers(self, role: str, keys: KeyFolders) -> list[Key]:
        found = [key for key in keys.keys(role) if key.keyid in self._role(role).keyids]
        if len(found) < self._role(role).threshold:
            _lacking(role, self._role(role).threshold, len(found))
        return found


def create(folder: Path, keys: KeyFolders, profile: Profile, now: float) -> SignedMetadata:
    """Make the keys that are not there yet and the first metadata of a repository.

    Raises:
        FleetError: when keys cannot be made or read.
    """
    folder.mkdir(parents=True)
    at = {role: expiry(now, profile[role].days) for role in TOP_ROLES}
    root = Metadata(Root(expires=at["root"], consistent_snapshot=True, version=1))
    made = {}
    for role in TOP_ROLES:
        plan = profile[role]
        have = keys.keys(role)
        made[role] = have + [keys.generate(role) for _ in range(plan.keys - len(have))]
        for key in made[role]:
            root.signed.add_key(key.signer.public_key, role)
        root.signed.roles[role].threshold = plan.threshold
    parts: dict[str, Metadata[Any]] = {
        "root": root,
        "targets": Metadata(Targets(expires=at["targets"], version=1)),
        "snapshot": Metadata(Snapshot(expires=at["snapshot"], version=1)),
        "timestamp": Metadata(Timestamp(expires=at["timestamp"], version=1)),
    }
    parts["timestamp"].signed.unrecognized_fields["signed_at"] = int(now)
    for role, metadata in parts.items():
        metadata.signed.unrecognized_fields[DAYS] = profile[role].days
        for key in made[role]:
            metadata.sign(key.signer, append=True)
        name = "timestamp.json" if role == "timestamp" else f"1.{role}.json"
        replace_file(folder / name, metadata.to_bytes())
    return SignedMetadata(folder)


def delegate(
    metadata: SignedMetadata, role: str, paths: list[str], signers: list[Key], plan: RolePlan
) -> None:
    """Let a role's keys sign for some paths, and nobody else below targets; not yet committed."""
    targets = metadata.targets.signed
    if targets.delegations is None:
        targets.delegations = Delegations({}, {})
    roles = targets.delegations.roles or {}
    targets.delegations.roles = roles
    roles[role] = DelegatedRole(role, [], plan.threshold, terminating=True, paths=paths)
    for key in signers:
        targets.add_key(key.signer.public_key, role)
    metadata.delegated[role] = _empty_targets(plan.days)


def _empty_targets(days: float) -> Metadata[Targets]:
    made = Metadata(Targets(expires=expiry(0, days)))
    made.signed.version = 0  # signing makes it 1
    made.signed.unrecognized_fields[DAYS] = days
    return made


def expiry(now: float, days: float) -> datetime:
    """The moment some days from now, in whole seconds as TUF writes it."""
    return datetime.fromtimestamp(int(now), timezone.utc) + timedelta(days=days)


def _days(metadata: Metadata[Any]) -> float:
    return float(metadata.signed.unrecognized_fields[DAYS])


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _lacking(role: str, threshold: int, found: int) -> None:
    raise FleetError(
        f"{threshold} of the keys of {role} must sign, {found} are at hand; name the folders or "
        f"sticks with the others: --keys FOLDER --keys FOLDER ({role}-N.pem)",
        reason="keys-missing",
    )


def _latest_root(folder: Path) -> int:
    versions = [
        int(match[1])
        for path in folder.iterdir()
        if (match := re.fullmatch(r"(\d+)\.root\.json", path.name))
    ]
    if not versions:
        raise FleetError(
            f"{folder.parent} is no repository; make one: "
            f"edgecascade fleet init --fleet {folder.parent.parent}",
            reason="no-repository",
        )
    return max(versions)


def _read(path: Path) -> Metadata[Any]:
    try:
        return Metadata.from_file(str(path))
    except (RepositoryError, StorageError, OSError) as error:
        raise FleetError(f"cannot read {path}: {error}", reason="no-repository") from error
