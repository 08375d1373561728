# SPDX-License-Identifier: Apache-2.0
"""The blobs of a repository: files named by their SHA-256, each stored once, never changed."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgecascade import manifest as layout
from edgecascade import verified
from edgecascade.errors import FleetError
from edgecascade.files import HASH_CHUNK_BYTES, fsync_file, fsync_folder, sha256_file, sha256_files
from edgecascade.fleet import delta
from edgecascade.fleet.release import DeltaRef, FileRef, Release

log = logging.getLogger(__name__)

WORTH = 0.8  # a delta that is no smaller than this part of its blob is not kept
MAX_BASES = 4  # older releases that a release has deltas from
SPARE_BYTES = 64 << 20  # for metadata, besides the blobs


class BlobFolder:
    """The folder blobs/. Its owner holds a lock, and knows what is named by a release."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self, blobs: Mapping[str, int]) -> dict[str, int]:
        """Those that are not there, with their sizes; nothing is read."""
        return {sha256: size for sha256, size in blobs.items() if not self._has(sha256, size)}

    def take(self, bundle: Path, files: Sequence[FileRef], *, link: bool) -> None:
        """Bring a bundle's files in, each hashed once; linked, or copied where that cannot be.

        Raises:
            FleetError: for a file that is not what its manifest says, or a disk without room.
        """
        size = sum(file.size for file in files)
        if not (link and bundle.stat().st_dev == self.folder.stat().st_dev):
            self._check_room(size)
        log.info("storing %d blobs, %.2f GB", len(files), size / 1e9)
        once = {file.sha256: bundle / file.path for file in files}
        # Several at a time: hashing releases the interpreter lock.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda item: self._take_one(item[1], item[0], link), once.items()))
        fsync_folder(self.folder)

    def deltas(
        self, release: Release, bases: Sequence[tuple[Release, str]]
    ) -> tuple[DeltaRef, ...]:
        """For each file that changed in place: its difference from the same file of a base."""
        if len(bases) > MAX_BASES:
            raise FleetError(f"deltas from {len(bases)} releases; at most {MAX_BASES}")
        made: dict[tuple[str, str], DeltaRef] = {}
        for base, _ in bases:
            before = {file.path: file for file in base.files}
            for file in release.files:
                old = before.get(file.path)
                known = file.sha256 in base.blobs or (old and (file.sha256, old.sha256) in made)
                if old and old.size == file.size and not known:
                    ref = self._delta(old, file)
                    if ref:
                        made[ref.target, ref.base] = ref
        fsync_folder(self.folder)
        return tuple(made.values())

    def check(self, blobs: Mapping[str, int]) -> list[str]:
        """What is wrong with these blobs, after reading all of them."""
        missing = self.missing(blobs)
        wrong = [f"{self.folder / sha256} is missing or has another size" for sha256 in missing]
        there = [sha256 for sha256 in blobs if sha256 not in missing]
        found = sha256_files([self.folder / sha256 for sha256 in there])
        return wrong + [
            f"{self.folder / sha256} is damaged; remove it and publish its bundle again"
            for sha256, actual in zip(there, found, strict=True)
            if actual != sha256
        ]

    def _has(self, sha256: str, size: int) -> bool:
        path = self.folder / sha256
        return path.is_file() and path.stat().st_size == size

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES:
            raise FleetError(
                f"{self.folder} has {free / 1e9:.2f} GB free, the release needs "
                f"{(size + SPARE_BYTES) / 1e9:.2f} GB; free space there",
                reason="disk",
            )

    def _take_one(self, source: Path, sha256: str, link: bool) -> None:
        part = self._part(sha256)
        actual = _link(source, part, sha256) if link else None
        if actual is None:
            actual = _copy(source, part)
        if actual != sha256:
            part.unlink()
            raise FleetError(
                f"{source} was changed: its SHA-256 is {actual}, its manifest promises {sha256}; "
                f"{layout.REBUILD}",
                reason="bundle-damaged",
            )
        self._keep(part, sha256)

    def _delta(self, old: FileRef, new: FileRef) -> DeltaRef | None:
        part = self._part(f"{new.sha256}-delta")
        part.unlink(missing_ok=True)
        size = delta.make(self.folder / old.sha256, self.folder / new.sha256, part)
        if size >= WORTH * new.size:
            part.unlink()
            return None
        sha256 = sha256_file(part)
        self._keep(part, sha256)
        return DeltaRef(new.sha256, old.sha256, sha256, size)

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.part-{os.getpid()}"

    def _keep(self, part: Path, sha256: str) -> None:
        fsync_file(part)
        os.replace(part, self.folder / sha256)


def _link(source: Path, part: Path, sha256: str) -> str | None:
    """A second name for the file, and its hash; None where there can be no such name."""
    part.unlink(missing_ok=True)
    try:
        os.link(source, part, follow_symlinks=False)
    except OSError:
        return None  # another file system, or one without links
    return sha256 if verified.is_verified(part, sha256) else sha256_file(part)


def _copy(source: Path, part: Path) -> str:
    """Copy a file, hashed on the way."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
    with open(source, "rb", buffering=0) as data, open(part, "wb", buffering=0) as out:
        while size := data.readinto(buffer):
            digest.update(buffer[:size])
            left = buffer[:size]
            while left:
                left = left[out.write(left) :]
    return digest.hexdigest()
