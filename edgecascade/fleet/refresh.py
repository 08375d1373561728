# SPDX-License-Identifier: Apache-2.0
"""A device's view of a repository: python-tuf's ngclient with our fetching, storing and clock.

trust = Trust(files, root_json, fetch)
trust.refresh(time.time()).order_keys            who may sign orders
trust.release("assistant", "2.3.0", sha256)      what an order asks to install

What ngclient leaves open is closed here: its files are synced; a floor outside of its folder stops
old metadata after a loss of that folder; time cannot run backwards; and nothing but metadata and
small documents comes through it, in memory, never more than was signed or is allowed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecascade.errors import FleetError, NetworkError, UpdateFailed, UpdateRefused
from edgecascade.files import fsync_file, fsync_folder, open_regular
from edgecascade.fleet import release as releases
from edgecascade.fleet import trust
from edgecascade.fleet.clock import Now, trusted_now
from edgecascade.fleet.floor import raise_floor, read_floor
from edgecascade.fleet.fs import Files, RealFiles, replace_file
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.orders import MAX_ORDER_BYTES, OrderKeys
from edgecascade.fleet.release import Release
from edgecascade.fleet.trust import Belief, Seen

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import Updater
    from tuf.ngclient.fetcher import FetcherInterface

log = logging.getLogger(__name__)

# A path below the repository and the most bytes to take -> the file's bytes. FileNotFoundError for
# one that is not there; NetworkError or OSError for a repository out of reach.
Fetch = Callable[[str, int], bytes]

TRUST_ROOT = "root.json"  # below the device's root: what all trust begins with
TUF = "tuf"  # ngclient's folder below the device's root
BELIEF = "belief"
MAX_ROOT_BYTES = 512_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_SNAPSHOT_BYTES = 2_000_000
MAX_TARGETS_BYTES = 5_000_000
MAX_ROOTS = 32  # rotations that a device may have slept through
MAX_DELEGATIONS = 16


@dataclass(frozen=True)
class Refreshed:
    """What a good refresh says."""

    order_keys: OrderKeys
    fresh_until: float
    now: Now


class Trust:
    """What is believed of one repository, below one device's root."""

    def __init__(
        self,
        root: Path,
        root_json: bytes,
        fetch: Fetch,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self._files: Files = RealFiles(root)
        self._root_json = root_json
        self._fetch = fetch
        self._updater: Updater | None = None
        self._monotonic = monotonic
        self._proven = read_floor(self._files).metadata.time
        self._since = monotonic()  # when this process learned what is proven

    def now(self, system: float) -> Now:
        """The time to judge by, whatever the system's clock says."""
        return trusted_now(system, self._proven, self._monotonic() - self._since)

    @property
    def belief(self) -> Belief | None:
        """What the last good refresh said; None before the first."""
        data = self._files.read(BELIEF, trust.MAX_BELIEF_BYTES)
        return None if data is None else Belief.parse(data)

    def order_keys(self, system: float) -> OrderKeys:
        """The keys of the last good refresh, for when the repository is out of reach.

        Raises:
            UpdateRefused: when there was none, or the keys have expired.
        """
        belief = self.belief
        if belief is None or self.now(system).time >= belief.keys_until:
            raise UpdateRefused(
                "who may sign orders is not known, or was known too long ago; the device must "
                "reach the repository",
                reason="expired-metadata",
            )
        return belief.keys

    def refresh(self, system: float) -> Refreshed:
        """Ask the repository for news and check it.

        Raises:
            UpdateRefused: for metadata that are forged, older than seen, or expired.
            NetworkError: when the repository is out of reach.
            UpdateFailed: when the device's disk fails.
        """
        self._updater = None
        with _explained():  # whatever is wrong with the floor, ngclient's files are sound
            floor = read_floor(self._files).metadata
        with self._explained():
            updater, now = self._refreshed(system, floor)
            known: Any = updater._trusted_set
            parts = known.root, known.timestamp, known.snapshot
            seen = trust.seen(*parts, known.targets, now)
            trust.check_floor(floor, seen)
            # Durable before it counts as seen: else a power cut leaves less than the floor names.
            self._sync()
            raise_floor(self._files, metadata=seen)
            self._proven, self._since = floor.merged(seen).time, self._monotonic()
            keys = OrderKeys.parse(self._target(updater, self._keys_target(updater)))
            until = trust.fresh_until(*parts)
            belief = Belief(until, known.targets.expires.timestamp(), keys)
            if self.belief != belief:
                replace_file(self._files, BELIEF, belief.to_bytes())
        self._updater = updater
        return Refreshed(keys, until, now)

    def release(self, name: str, version: str, sha256: str) -> tuple[Release, bytes]:
        """The release that an order names, and its bytes; after `refresh`.

        Raises:
            UpdateRefused: when the repository did not sign it, or signed another.
            NetworkError: when the repository is out of reach.
        """
        if self._updater is None:
            raise FleetError("a release can be asked for after a refresh that succeeded")
        with self._explained():
            found = self._updater.get_targetinfo(releases.target_path(name, version))
            self._sync()
            entry = trust.check_target(found, name, version, sha256)
            data = self._target(self._updater, entry)
        return trust.read_release(data, name, version), data

    def _refreshed(self, system: float, floor: Seen) -> tuple[Updater, Now]:
        with fleet_extra():
            from tuf.api.exceptions import ExpiredMetadataError
        now = self.now(system)
        if now.suspect:
            log.warning("the clock says %.0f, which is past: going by %.0f", system, now.time)
        updater = self._client(now)
        try:
            updater.refresh()
        except ExpiredMetadataError:
            if not trust.replaces_online_keys(updater._trusted_set.root, floor):
                raise
            # A thief may have told the time, with keys that have been taken away since.
            self._proven, self._since = 0.0, self._monotonic()
            now = self.now(system)
            updater = self._client(now)
            updater.refresh()
        return updater, now

    def _forget(self) -> None:
        """Begin anew next time; what must not be forgotten is in the floor."""
        folder = self.root / TUF
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with _explained():
                yield
        except (UpdateFailed, UpdateRefused):
            # ngclient keeps each file that is good by itself. A snapshot signed with a stolen key
            # would stay in the way of the honest one of the same number. And where its files cannot
            # be read or replaced, they are better gone.
            self._forget()
            raise

    def _client(self, now: Now) -> Updater:
        with fleet_extra():
            from tuf.ngclient import Updater, UpdaterConfig
        check_root(self._root_json, self.root / TRUST_ROOT)
        folder = self.root / TUF
        folder.mkdir(parents=True, exist_ok=True)
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOTS,
            max_delegations=MAX_DELEGATIONS,
            root_max_length=MAX_ROOT_BYTES,
            timestamp_max_length=MAX_TIMESTAMP_BYTES,
            snapshot_max_length=MAX_SNAPSHOT_BYTES,
            targets_max_length=MAX_TARGETS_BYTES,
        )
        updater = Updater(
            str(folder),
            "metadata/",
            fetcher=_fetcher(self._fetch),
            config=config,
            bootstrap=self._root_json,
        )
        # ngclient reads the system's clock here, which may be decades behind.
        updater._trusted_set.reference_time = datetime.fromtimestamp(now.time, timezone.utc)
        return updater

    def _keys_target(self, updater: Updater) -> TargetFile:
        found = updater.get_targetinfo(trust.ORDER_KEYS)
        if found is None:
            raise UpdateRefused(
                f"the repository has no {trust.ORDER_KEYS}; nobody may sign orders",
                reason="no-order-keys",
            )
        return found

    def _target(self, updater: Updater, found: TargetFile) -> bytes:
        """A small target in memory: ngclient would write it to /tmp and copy it, unsynced."""
        limit = max(MAX_ORDER_BYTES, releases.MAX_RELEASE_BYTES)
        if found.length > limit:
            raise UpdateRefused(
                f"{found.path} has {found.length} bytes; at most {limit} are read",
                reason="too-large",
            )
        folder, _, name = found.path.rpartition("/")
        path = f"targets/{folder}/{found.hashes['sha256']}.{name}"
        data = _bounded(self._fetch, path, found.length)
        found.verify_length_and_hashes(data)
        return data

    def _sync(self) -> None:
        """Wait until ngclient's files are on the disk; it does not."""
        for folder, _, names in os.walk(self.root / TUF):
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink():
                    fsync_file(path)
            fsync_folder(Path(folder))


def check_root(data: bytes, path: str | Path) -> None:
    """Whether trust can begin with the content of a file.

    Raises:
        UpdateRefused: naming the file, when it is no root metadata, or not signed by its own keys.
    """
    with fleet_extra():
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata, Root
    try:
        if len(data) > MAX_ROOT_BYTES:
            raise ValueError(f"{len(data)} bytes are too many")
        found = Metadata[Root].from_bytes(data)
        if not isinstance(found.signed, Root):
            raise ValueError("it is other metadata")
        found.signed.verify_delegate(Root.type, found.signed_bytes, found.signatures)
    except (RepositoryError, ValueError) as error:
        raise UpdateRefused(
            f"{path} is no repository's root.json ({error}); the operator has the right one",
            reason="malformed",
        ) from error


def folder_fetch(folder: str | Path) -> Fetch:
    """Fetch from a published folder: a memory stick, a mounted share."""
    base = Path(folder)

    def fetch(path: str, limit: int) -> bytes:
        parts = path.split("/")
        if {"", ".", ".."} & set(parts):
            raise FileNotFoundError(path)
        with open_regular(base / path) as source:
            return source.read(limit + 1)

    return fetch


def _bounded(fetch: Fetch, path: str, limit: int) -> bytes:
    with fleet_extra():
        from tuf.api.exceptions import DownloadLengthMismatchError
    try:
        data = fetch(path, limit)
    except FileNotFoundError:
        raise
    except OSError as error:  # of the other side; of this device's disk it would mean "disk"
        raise NetworkError(f"cannot get {path} from the repository: {error}") from error
    if len(data) > limit:
        raise DownloadLengthMismatchError(f"{path} has more than {limit} bytes")
    return data


def _fetcher(fetch: Fetch) -> FetcherInterface:
    with fleet_extra():
        from tuf.api.exceptions import DownloadError, DownloadHTTPError
        from tuf.ngclient.fetcher import FetcherInterface

    class Fetcher(FetcherInterface):
        def _fetch(self, url: str) -> Iterator[bytes]:
            raise NotImplementedError(f"{url}: only bounded downloads are made")

        def download_bytes(self, url: str, max_length: int) -> bytes:
            try:
                return _bounded(fetch, url, max_length)
            except FileNotFoundError as error:
                raise DownloadHTTPError(f"{url} is not there", 404) from error
            except NetworkError as error:
                raise DownloadError(f"{url}: {error}") from error

    return Fetcher()


@contextmanager
def _explained() -> Iterator[None]:
    """python-tuf's errors as ours."""
    with fleet_extra():
        from tuf.api import exceptions as tuf
    try:
        yield
    except tuf.DownloadLengthMismatchError as error:
        raise UpdateRefused(f"more bytes than were signed: {error}", reason="too-long") from error
    except tuf.DownloadHTTPError as error:
        raise NetworkError(f"the repository lacks a file it must have: {error}") from error
    except tuf.DownloadError as error:
        raise NetworkError(f"the repository is out of reach: {error}") from error
    except tuf.ExpiredMetadataError as error:
        raise UpdateRefused(
            f"{error}: the repository was not refreshed in time, somebody hides what is current, "
            "or this device's clock is ahead",
            reason="expired-metadata",
        ) from error
    except tuf.BadVersionNumberError as error:
        raise UpdateRefused(f"metadata older than seen: {error}", reason="rollback") from error
    except tuf.UnsignedMetadataError as error:
        raise UpdateRefused(f"metadata lack signatures: {error}", reason="signature") from error
    except tuf.LengthOrHashMismatchError as error:
        raise UpdateRefused(f"not what was signed: {error}", reason="wrong-bytes") from error
    except tuf.RepositoryError as error:
        raise UpdateRefused(f"metadata cannot be trusted: {error}", reason="malformed") from error
    except FileNotFoundError as error:
        raise NetworkError(f"the repository lacks a file it must have: {error}") from error
    except OSError as error:
        raise UpdateFailed(f"metadata cannot be stored: {error}", reason="disk") from error
