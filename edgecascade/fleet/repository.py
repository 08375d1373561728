# SPDX-License-Identifier: Apache-2.0
"""A repository of releases: a folder that any static HTTP server, object store or stick can hold.

    metadata/                    who signed what (metadata.py)
    targets/bundles/NAME/VERSION/SHA256.release.json
    targets/orders/SHA256.keys.json
    blobs/SHA256                 files of bundles, each stored once
    orders/GROUP.json            the latest order of each group, for devices without a broker

Nothing is ever changed in place but metadata/timestamp.json and orders/, so everything else may be
cached for ever. What is written before the timestamp names it is invisible: a writer that is killed
leaves the old repository, and the next one removes what it left.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecascade import manifest as layout
from edgecascade.bundle import Bundle
from edgecascade.errors import FleetError
from edgecascade.files import fsync_folder, replace_file
from edgecascade.fleet import orders, release, trust
from edgecascade.fleet.blobs import BlobFolder
from edgecascade.fleet.keys import Key, KeyFolders
from edgecascade.fleet.metadata import (
    ORDERS,
    PROFILES,
    Profile,
    RolePlan,
    SignedMetadata,
    create,
    delegate,
)
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.orders import NAME, Order, OrderKey, OrderKeys
from edgecascade.fleet.release import FileRef, Health, Release, Requires
from edgecascade.fleet.settings import foreign_config

with fleet_extra():
    from tuf.api.metadata import TargetFile, Targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What `publish` did."""

    release: Release
    sha256: str  # of release.json; what an order names
    blobs_written: int = 0
    bytes_written: int = 0
    blobs_shared: int = 0  # the repository had them


@dataclass(frozen=True)
class Offer:
    """What a release is, besides its files."""

    name: str
    version: str
    requires: Requires = field(default_factory=Requires)
    health: Health = field(default_factory=Health)
    config: dict[str, Any] = field(default_factory=dict)
    deltas_from: tuple[str, ...] = ()  # versions that devices may have


class Repository:
    """A repository, with the private keys that are at hand.

    Each method that changes something does it under a lock, and all or nothing.
    """

    def __init__(self, folder: str | Path, keys: KeyFolders) -> None:
        self.folder = Path(folder)
        self.keys = keys
        self._blobs = BlobFolder(self.folder / "blobs")
        if not (self.folder / "metadata").is_dir():
            raise FleetError(
                f"{self.folder} is no repository; make one: "
                f"edgecascade fleet init --fleet {self.folder.parent}",
                reason="no-repository",
            )

    @classmethod
    def init(
        cls,
        folder: str | Path,
        keys: KeyFolders,
        now: float,
        *,
        profile: str | Profile = "small",
        operators: Sequence[str] = ("operator",),
    ) -> Repository:
        """Make a repository and the keys that are missing.

        Raises:
            FleetError: when there is something at `folder` already, or an operator's name is none.
        """
        _check_operators(operators)
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FleetError(f"{folder} exists; choose another folder", reason="exists")
        plan = PROFILES.get(profile) if isinstance(profile, str) else profile
        if plan is None:
            raise FleetError(f"no profile {profile!r}; choose from {', '.join(PROFILES)}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.init-*"):
            shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f".{folder.name}.init-{os.getpid()}")
        create(part / "metadata", keys, plan, now)
        for name in ("blobs", "orders", "targets/bundles", "targets/orders"):
            (part / name).mkdir(parents=True)
        made = keys.keys(ORDERS)
        count = max(plan[ORDERS].keys, len(operators))
        made += [keys.generate(ORDERS) for _ in range(count - len(made))]
        names = [*operators, *(f"operator-{i}" for i in range(len(operators) + 1, 65))]
        owners = [OrderKey(n, key.public) for n, key in zip(names, made, strict=False)]
        new = cls(part, keys)
        new._file_order_keys(
            SignedMetadata(part / "metadata"),
            OrderKeys(plan[ORDERS].threshold, 0, tuple(owners)),
            now,
        )
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
        fsync_folder(folder.parent)
        return cls(folder, keys)

    @property
    def root_json(self) -> bytes:
        """The newest root metadata: what a device is given when it is set up."""
        version = self._metadata().root.signed.version
        return (self.folder / "metadata" / f"{version}.root.json").read_bytes()

    def order_keys(self) -> OrderKeys:
        """Who may sign orders."""
        entry = self._metadata().targets.signed.targets[trust.ORDER_KEYS]
        return OrderKeys.parse(self._target_file(trust.ORDER_KEYS, entry).read_bytes())

    def releases(self) -> dict[str, list[tuple[Release, str]]]:
        """All releases by name, oldest first, each with the SHA-256 that an order gives."""
        found: dict[str, list[tuple[Release, str]]] = {}
        metadata = self._metadata()
        for part in (metadata.targets, *metadata.delegated.values()):
            for path, entry in part.signed.targets.items():
                if path.startswith("bundles/"):
                    data = self._target_file(path, entry).read_bytes()
                    one = release.parse(data)
                    found.setdefault(one.name, []).append((one, entry.hashes["sha256"]))
        return {name: sorted(each, key=lambda r: r[0].seq) for name, each in found.items()}

    def release(self, name: str, version: str | None = None) -> tuple[Release, str]:
        """A release and its SHA-256; the newest when no version is given.

        Raises:
            FleetError: when there is none.
        """
        return _version(self.releases().get(name, []), name, version)

    def expiries(self) -> dict[str, float]:
        """When each role's signature ends."""
        return self._metadata().expiries()

    def keyids(self) -> dict[str, list[str]]:
        """The ids of the keys that may sign for each role."""
        metadata = self._metadata()
        return {role: metadata.keyids(role) for role in metadata.expiries()}

    def next_seq(self, group: str) -> int:
        """The sequence number for the next order to a group."""
        path = self.folder / "orders" / f"{group}.json"
        last = 0
        if path.exists():
            last = orders.unverified(path.read_bytes()).seq
        return max(last + 1, self.order_keys().first_seq)

    def check(self) -> list[str]:
        """What is wrong with the stored blobs, after reading all of them."""
        wanted: dict[str, int] = {}
        for each in self.releases().values():
            for one, _ in each:
                wanted |= one.blobs | {d.sha256: d.size for d in one.deltas}
        return self._blobs.check(wanted)

    def publish(
        self, bundle: str | Path, offer: Offer, now: float, *, link: bool = True
    ) -> Published:
        """Add a bundle as a release. A release once published never changes.

        Blobs that the repository has are not read; the others are hashed once, and linked (or
        copied with `link` false, or to another file system).

        Raises:
            FleetError: when that version exists with other content, or keys or space are missing.
            BundleError: for a bundle that is damaged.
        """
        folder = Path(bundle)
        with self._changing() as metadata:
            older = self.releases().get(offer.name, [])
            draft = _draft(folder, offer, older)
            if found := _same_version(draft, older):
                return Published(found[0], found[1], blobs_shared=len(draft.blobs))
            role = _signing_role(metadata, offer.name)
            metadata.check_keys([role, "snapshot", "timestamp"], self.keys)
            new = self._blobs.missing(draft.blobs)
            self._blobs.take(folder, [f for f in draft.every_file if f.sha256 in new], link=link)
            bases = [_version(older, draft.name, version) for version in offer.deltas_from]
            draft = replace(draft, deltas=self._blobs.deltas(draft, bases))
            sha256 = self._file_release(metadata, draft, now)
        return Published(draft, sha256, len(new), sum(new.values()), len(draft.blobs) - len(new))

    def sign_release(self, made: Release, now: float) -> str:
        """Add a release whose blobs are there, or will be; its SHA-256."""
        with self._changing() as metadata:
            return self._file_release(metadata, made, now)

    def sign_order(self, order: Order) -> bytes:
        """Sign an order with the operators' keys at hand, and keep it as its group's latest.

        Raises:
            FleetError: when too few keys are at hand, or the group has a later order.
        """
        known = self.order_keys()
        mine = [
            key.signer
            for key in self.keys.keys(ORDERS)
            if key.public
            in {k.public for k in known.keys if not k.groups or order.group in k.groups}
        ]
        if len(mine) < known.threshold:
            raise FleetError(
                f"{known.threshold} operators must sign for group {order.group!r}, keys of "
                f"{len(mine)} are at hand ({ORDERS}-N.pem); name their folder with --keys, or say "
                "edgecascade fleet keys --add-operator NAME",
                reason="keys-missing",
            )
        with self._locked():
            least = self.next_seq(order.group)
            envelope = orders.sign(order, mine)
            path = self.folder / "orders" / f"{order.group}.json"
            if order.seq < least and not (path.exists() and path.read_bytes() == envelope):
                raise FleetError(
                    f"order {order.order!r} has seq {order.seq}; the next one for group "
                    f"{order.group!r} is {least}",
                    reason="old-seq",
                )
            replace_file(path, envelope)
        return envelope

    def refresh(self, now: float) -> dict[str, float]:
        """Sign a new timestamp, and what else is due as far as its keys are at hand.

        Returns when each role's signature ends. Run it more often than the timestamp expires.
        """
        with self._changing() as metadata:
            due = metadata.due(now)
            ready = [role for role in due if metadata.can_sign(role, self.keys)]
            for role in set(due) - set(ready):
                log.warning("%s expires soon, and its keys are not at hand", role)
            if "root" in ready:
                metadata.commit_root(self.keys, now, self.keys.keys("root"))
            metadata.commit(ready, self.keys, now)
            return metadata.expiries()

    def rotate(self, role: str, now: float, *, lost: Iterable[str] = ()) -> list[Key]:
        """Give a role new keys in place of those `lost` (by the start of the id), or of all.

        Works without the old keys, except that enough root keys must sign. For a stolen key it is
        the same: from the moment a device sees the new root, the old key signs nothing.
        """
        with self._changing() as metadata:
            if role not in metadata.root.signed.roles:
                raise FleetError(
                    f"{role!r} is no role; choose from {', '.join(metadata.root.signed.roles)}"
                )
            old = metadata.keyids(role)
            gone = [_named(each, old, role) for each in lost] or old
            before = self.keys.keys("root")
            needed = {"targets": ["snapshot", "timestamp"], "snapshot": ["timestamp"]}
            metadata.check_keys(["root", *needed.get(role, [])], self.keys)
            if role == "root":
                metadata.check_keys(["timestamp"], self.keys)
            new = [self.keys.generate(role) for _ in gone]
            if role != "root":
                # Signed by old and new keys, this is good before and after the new root.
                try:
                    metadata.commit([role], self.keys, now, besides={role: new})
                except FleetError as error:
                    log.warning("devices wait until all is signed again: %s", error)
            for keyid in gone:
                metadata.root.signed.revoke_key(keyid, role)
            for key in new:
                metadata.root.signed.add_key(key.signer.public_key, role)
            metadata.commit_root(self.keys, now, before)
            metadata.commit([role], self.keys, now)
            return new

    def add_order_key(self, owner: str, now: float, groups: Sequence[str] = ()) -> Key:
        """Make a key for one more operator."""
        _check_operators([owner], groups)
        with self._changing() as metadata:
            metadata.check_keys(["targets", "snapshot", "timestamp"], self.keys)
            known = self.order_keys()
            if owner in {key.owner for key in known.keys}:
                raise FleetError(f"operator {owner!r} has a key; revoke it first", reason="exists")
            made = self.keys.generate(ORDERS)
            more = (*known.keys, OrderKey(owner, made.public, tuple(groups)))
            self._file_order_keys(metadata, replace(known, keys=more), now)
            return made

    def revoke_order_key(self, owner: str, now: float) -> OrderKeys:
        """Take an operator's key away, and begin a new epoch: orders signed before are void.

        Sign the orders that should stand again.
        """
        with self._changing() as metadata:
            known = self.order_keys()
            left = tuple(key for key in known.keys if key.owner != owner)
            if left == known.keys:
                names = ", ".join(key.owner for key in known.keys)
                raise FleetError(f"no operator {owner!r}; there are {names}")
            if len(left) < known.threshold:
                raise FleetError(
                    f"without {owner!r} there are {len(left)} operators, {known.threshold} must "
                    "sign; add another first",
                    reason="keys-missing",
                )
            after = OrderKeys(known.threshold, known.epoch + 1, left)
            self._file_order_keys(metadata, after, now)
            return after

    def delegate(self, name: str, now: float, plan: RolePlan | None = None) -> list[Key]:
        """Give a bundle's name keys of its own: BUNDLE-publisher-N.pem sign its releases."""
        plan = plan or RolePlan(1, 1, 90)
        if not NAME.fullmatch(name):  # it becomes the name of a file, and a pattern of paths
            raise FleetError(
                f"{name!r:.80} is no bundle's name; expected {NAME.pattern}", reason="name"
            )
        role = _bundle_role(name)
        with self._changing() as metadata:
            metadata.check_keys(["targets", "snapshot", "timestamp"], self.keys)
            if role in metadata.delegated:
                raise FleetError(f"{name!r} has its own keys already", reason="exists")
            if name in self.releases():
                raise FleetError(
                    f"{name!r} has releases that targets signed; delegate a name before its first",
                    reason="exists",
                )
            have = self.keys.keys(role)
            made = have + [self.keys.generate(role) for _ in range(plan.keys - len(have))]
            delegate(metadata, role, [f"bundles/{name}/*/release.json"], made, plan)
            metadata.commit(["targets", role], self.keys, now)
            return made

    def _metadata(self) -> SignedMetadata:
        return SignedMetadata(self.folder / "metadata")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _changing(self) -> Iterator[SignedMetadata]:
        """The metadata to change, alone, without what a killed writer left."""
        with self._locked():
            for path in self.folder.glob("**/.*.part-*"):
                log.warning("removing %s, left by a writer that was interrupted", path)
                path.unlink()
            yield self._metadata()

    def _file_release(self, metadata: SignedMetadata, made: Release, now: float) -> str:
        role = _signing_role(metadata, made.name)
        part = metadata.delegated.get(role, metadata.targets)
        path = release.target_path(made.name, made.version)
        sha256 = self._file(part.signed, path, made.to_bytes())
        metadata.commit([role], self.keys, now)
        return sha256

    def _file_order_keys(self, metadata: SignedMetadata, keys: OrderKeys, now: float) -> None:
        self._file(metadata.targets.signed, trust.ORDER_KEYS, keys.to_bytes())
        metadata.commit(["targets"], self.keys, now)

    def _file(self, part: Targets, path: str, data: bytes) -> str:
        """Store a target under its hash and enter it; nobody sees it before the commit."""
        entry = TargetFile.from_data(path, data, ["sha256"])
        part.targets[path] = entry
        target = self._target_file(path, entry)
        for folder in [*reversed(target.relative_to(self.folder).parents)][1:]:
            if not (self.folder / folder).is_dir():
                (self.folder / folder).mkdir()
                fsync_folder((self.folder / folder).parent)
        replace_file(target, data)
        return str(entry.hashes["sha256"])

    def _target_file(self, path: str, entry: TargetFile) -> Path:
        folder, _, name = path.rpartition("/")
        return self.folder / "targets" / folder / f"{entry.hashes['sha256']}.{name}"


def _check_operators(names: Sequence[str], groups: Sequence[str] = ()) -> None:
    """Whether keys may be made for them; nothing has been written yet."""
    for name in names:
        try:
            OrderKey(name, "0" * 64, tuple(groups))
        except ValueError as error:
            raise FleetError(f"no such operator can be: {error}", reason="name") from None
    if len(set(names)) < len(names):
        raise FleetError(f"operators are {', '.join(names)}; name each once", reason="exists")


def _draft(folder: Path, offer: Offer, older: Sequence[tuple[Release, str]]) -> Release:
    """The release of a bundle; its files' hashes are those of its manifest."""
    with Bundle.open(folder, verify=False) as bundle:
        files = bundle.manifest.files
        manifest_bytes = (folder / layout.MANIFEST).stat().st_size
        bundle_id = bundle.id
    # A release never changes, and this one would be of use to nobody.
    if foreign := foreign_config(offer.config):
        raise FleetError(f"no such release can be: {foreign}", reason="malformed")
    try:
        return Release(
            name=offer.name,
            version=offer.version,
            seq=max((one.seq for one, _ in older), default=0) + 1,
            manifest=FileRef(layout.MANIFEST, manifest_bytes, bundle_id),
            files=tuple(FileRef(p, f.bytes, f.sha256) for p, f in sorted(files.items())),
            requires=offer.requires,
            health=offer.health,
            config=offer.config,
        )
    except ValueError as error:
        raise FleetError(f"no such release can be: {error}", reason="malformed") from None


def _version(
    every: Sequence[tuple[Release, str]], name: str, version: str | None
) -> tuple[Release, str]:
    fitting = [each for each in every if version in (None, each[0].version)]
    if not fitting:
        known = ", ".join(one.version for one, _ in every) or "none"
        raise FleetError(
            f"there is no release {f'{name} {version}' if version else name}; there are: {known}",
            reason="unknown-release",
        )
    return fitting[-1]


def _named(start: str, keyids: Sequence[str], role: str) -> str:
    """The one key whose id begins so."""
    found = [keyid for keyid in keyids if keyid.startswith(start)]
    if len(found) != 1:
        raise FleetError(
            f"{role} has {len(found)} keys {start!r}; it has {', '.join(keyids)}", reason="key"
        )
    return found[0]


def _same_version(
    draft: Release, older: Sequence[tuple[Release, str]]
) -> tuple[Release, str] | None:
    """The release of this version, when it is the same in all but its number and deltas.

    Raises:
        FleetError: when it is another one.
    """
    for one, sha256 in older:
        if one.version == draft.version:
            if replace(one, seq=draft.seq, deltas=()) == draft:
                return one, sha256
            raise FleetError(
                f"{draft.name} {draft.version} is published with other content; "
                "a release never changes: choose another version",
                reason="exists",
            )
    return None


def _signing_role(metadata: SignedMetadata, name: str) -> str:
    role = _bundle_role(name)
    return role if role in metadata.delegated else "targets"


def _bundle_role(name: str) -> str:
    return f"{name.lower()}-publisher"
