# SPDX-License-Identifier: Apache-2.0
"""The blobs and bundles of a device. A bundle's folder is hard links into the blobs.

    blobs/<sha256>           immutable; a file that two bundles share is one blob
    bundles/<manifest>/      what LLM.load opens, named by the SHA-256 of its manifest.json
    partial/<sha256>         on its way
    releases/<sha256>        what the bundles' releases say of their files and health

So an update needs room for the blobs that are not there yet, and for nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

from edgecascade.errors import BundleError, FleetError, UpdateFailed
from edgecascade.fleet import release
from edgecascade.fleet.fs import Files, remove_tree, replace_file
from edgecascade.fleet.release import MAX_RELEASE_BYTES, Release
from edgecascade.fleet.state import Slot
from edgecascade.manifest import ENGINES, MANIFEST, StoredFile, parse_manifest
from edgecascade.tensors import round_up

FOLDERS = ("blobs", "bundles", "partial", "releases")
UNFINISHED = ".new"  # ends the name of a bundle's folder that is being made
MARGIN_BYTES = 8 << 20  # for state, folders and what a file system needs itself
DISK_BLOCK = 4096


class Store:
    """Everything a device holds but its state; all of it is named by its content."""

    def __init__(self, files: Files, margin_bytes: int = MARGIN_BYTES) -> None:
        self.files = files
        self.margin_bytes = margin_bytes

    def prepare(self) -> None:
        """Make the folders of a new device."""
        if any(not self.files.is_folder(folder) for folder in FOLDERS):
            for folder in FOLDERS:
                self.files.make_folder(folder)
            self.files.sync_folder("")

    def put_release(self, sha256: str, data: bytes) -> None:
        """Keep a release document, durably, before the state names it."""
        path = f"releases/{sha256}"
        if self.files.read(path, MAX_RELEASE_BYTES) != data:
            replace_file(self.files, path, data)

    def release(self, sha256: str) -> Release:
        """A release document that was kept.

        Raises:
            UpdateFailed: when it is absent or not the one of that name.
        """
        data = self.files.read(f"releases/{sha256}", MAX_RELEASE_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise UpdateFailed(
                f"release document {sha256} is missing or damaged; order the release again",
                reason="release-lost",
            )
        return _parsed(data)

    def missing(self, wanted: Release) -> dict[str, int]:
        """Blobs of a release that are not in the store, with their sizes."""
        return {
            sha256: size
            for sha256, size in wanted.blobs.items()
            if self.files.size(f"blobs/{sha256}") != size
        }

    def need_bytes(self, wanted: Release) -> int:
        """How much more the disk must hold before this release is installed."""
        missing = self.missing(wanted)
        if not missing:
            return 0
        need = self.margin_bytes
        for sha256, size in missing.items():
            begun = self.files.size(f"partial/{sha256}") or 0
            need += max(0, round_up(size - begun, DISK_BLOCK))
        return need

    def spare_bytes(self, spare: Slot | None, others: Iterable[Slot]) -> int:
        """How much goes when this bundle goes."""
        if spare is None:
            return 0
        kept = {sha256 for slot in others for sha256 in self._blobs_of(slot)}
        gone = self._blobs_of(spare).keys() - kept
        return sum(self.files.size(f"blobs/{sha256}") or 0 for sha256 in gone)

    def adopt(self, sha256: str) -> None:
        """Make a blob of a download that is complete; a second time does nothing."""
        if self.files.size(f"partial/{sha256}") is None:
            return
        self.files.sync(f"partial/{sha256}")
        self.files.rename(f"partial/{sha256}", f"blobs/{sha256}")
        self.files.sync_folder("blobs")

    def verify(self, wanted: Release) -> tuple[str, ...]:
        """Hash all blobs of a release; remove and name those that are not what their name says."""
        return self._damaged(_files(wanted))

    def _damaged(self, files: Mapping[str, StoredFile]) -> tuple[str, ...]:
        blobs = dict.fromkeys(file.sha256 for file in files.values())
        damaged = self.files.differing([(f"blobs/{sha256}", sha256) for sha256 in blobs])
        for path in damaged:
            remove_tree(self.files, path)
        if damaged:
            self.files.sync_folder("blobs")
        return tuple(path.removeprefix("blobs/") for path in damaged)

    def stage(self, wanted: Release) -> None:
        """Make the bundle's folder, whole or not at all. Engines that it had before stay."""
        folder, files = f"bundles/{wanted.manifest.sha256}", _files(wanted)
        if not self._is_linked(files, folder):
            self._link_all(files, folder)

    def check(self, slot: Slot) -> str:
        """What is wrong with an installed bundle, or nothing. What is damaged is removed."""
        folder = f"bundles/{slot.manifest}"
        try:
            files = self.files_of(slot)
        except FleetError as error:
            self._remove_folder(folder)
            return str(error)
        damaged = self._damaged(files)
        if damaged:
            self._remove_folder(folder)
            return f"blobs changed or missing: {', '.join(damaged)}"
        if not self._is_linked(files, folder):
            self._link_all(files, folder)  # the blobs are sound: the folder follows from them
        return ""

    def files_of(self, slot: Slot) -> dict[str, StoredFile]:
        """What a bundle's folder holds, as its release says, or as its own manifest does.

        Raises:
            FleetError: when both are lost.
        """
        try:
            return _files(self.release(slot.release))
        except UpdateFailed:
            path = f"blobs/{slot.manifest}"
            data = self.files.read(path, MAX_RELEASE_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != slot.manifest:
                raise
        try:
            inside = parse_manifest(data, path).files
        except BundleError as error:
            raise UpdateFailed(str(error), reason="release-lost") from error
        return {MANIFEST: StoredFile(len(data), slot.manifest), **inside}

    def collect(self, keep: Iterable[Slot]) -> None:
        """Remove what none of these bundles has."""
        slots = tuple(keep)
        blobs = {sha256 for slot in slots for sha256 in self._blobs_of(slot)}
        folders = {slot.manifest for slot in slots}
        releases = {slot.release for slot in slots}
        for name in self.files.names("bundles"):
            if name not in folders:
                self._remove_folder(f"bundles/{name}")
        for folder, kept in (("blobs", blobs), ("releases", releases)):
            for name in self.files.names(folder):
                if name not in kept:
                    remove_tree(self.files, f"{folder}/{name}")
        for name in self.files.names("partial"):
            if name not in blobs or self.files.size(f"blobs/{name}") is not None:
                remove_tree(self.files, f"partial/{name}")

    def _blobs_of(self, slot: Slot) -> dict[str, int]:
        try:
            return {file.sha256: file.bytes for file in self.files_of(slot).values()}
        except FleetError:  # nothing is left that says what it was: it cannot be run again
            return {}

    def _is_linked(self, files: Mapping[str, StoredFile], folder: str) -> bool:
        """Whether a folder holds exactly the bundle's files, each the blob itself."""
        names = set(self.files.names(folder)) - {ENGINES}
        return names == files.keys() and all(
            self.files.same(f"{folder}/{path}", f"blobs/{file.sha256}")
            for path, file in files.items()
        )

    def _link_all(self, files: Mapping[str, StoredFile], folder: str) -> None:
        making = f"{folder}{UNFINISHED}"
        remove_tree(self.files, making)
        self.files.make_folder(making)
        for path, file in files.items():
            self.files.link(f"blobs/{file.sha256}", f"{making}/{path}")
        self.files.sync_folder(making)
        if self.files.is_folder(f"{folder}/{ENGINES}"):
            self.files.rename(f"{folder}/{ENGINES}", f"{making}/{ENGINES}")
        remove_tree(self.files, folder)
        self.files.rename(making, folder)
        self.files.sync_folder("bundles")

    def _remove_folder(self, folder: str) -> None:
        # Without its manifest it is no bundle any more, wherever the removal is interrupted.
        if self.files.is_folder(folder):
            self.files.remove(f"{folder}/{MANIFEST}")
        remove_tree(self.files, folder)


@lru_cache(maxsize=8)
def _parsed(document: bytes) -> Release:
    return release.parse(document)


def _files(wanted: Release) -> dict[str, StoredFile]:
    return {file.path: StoredFile(file.size, file.sha256) for file in wanted.every_file}
