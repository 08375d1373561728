# SPDX-License-Identifier: Apache-2.0
"""Every file that an update touches goes through `Files`: the disk, or a test's idea of one.

Paths are relative to the device's folder and use "/". What changes a file is one effect per call: a
power cut falls before or after it. Nothing is durable before `sync` (data) and `sync_folder`
(names) return.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from edgecascade import verified
from edgecascade.files import fsync_file, fsync_folder, open_regular, sha256_file

FILE_MODE = 0o644


class Files(Protocol):
    """A folder tree with the promises of a POSIX file system, and no more."""

    def read(self, path: str, limit: int) -> bytes | None:
        """A file's content; None when it is absent, no regular file, or beyond `limit` bytes."""

    def size(self, path: str) -> int | None:
        """Size of a regular file; None for anything else."""

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; empty when it is absent or no folder."""

    def is_folder(self, path: str) -> bool:
        """Whether it is a folder, and no link to one."""

    def same(self, one: str, other: str) -> bool:
        """Whether both names are of one file."""

    def differing(self, wanted: Sequence[tuple[str, str]], *, stamps: bool = True) -> list[str]:
        """Of pairs (path, sha256), the paths that have another content or are no file.

        `stamps`: a file that was hashed before and not written since is not read again.
        """

    def free_bytes(self) -> int:
        """What may still be written."""

    def make_folder(self, path: str) -> None:
        """Make a folder whose parent exists, unless it is there."""

    def create(self, path: str, data: bytes) -> None:
        """Write a file anew."""

    def append(self, path: str, data: bytes) -> None:
        """Write at a file's end."""

    def sync(self, path: str) -> None:
        """Wait until a file's data are on the disk."""

    def sync_folder(self, path: str) -> None:
        """Wait until a folder's names are on the disk."""

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name, replacing a file."""

    def link(self, old: str, new: str) -> None:
        """Give a file one more name."""

    def remove(self, path: str) -> None:
        """Remove a name of a file or link; nothing if it is absent."""

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder; nothing if it is absent."""


def replace_file(files: Files, path: str, data: bytes) -> None:
    """Put a small file in place, whole or not at all, and durable when this returns."""
    part = f"{path}.part"
    files.create(part, data)
    files.sync(part)
    files.rename(part, path)
    files.sync_folder(path.rpartition("/")[0])


def remove_tree(files: Files, path: str) -> None:
    """Remove a file or a folder with all in it."""
    if files.is_folder(path):
        for name in files.names(path):
            remove_tree(files, f"{path}/{name}")
        files.remove_folder(path)
    else:
        files.remove(path)


class RealFiles:
    """Files below a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str, limit: int) -> bytes | None:
        """See Files."""
        try:
            with open_regular(self.root / path) as source:
                data = source.read(limit + 1)
        except FileNotFoundError:
            return None
        return data if len(data) <= limit else None

    def size(self, path: str) -> int | None:
        """See Files."""
        found = self._status(path)
        return found.st_size if found and stat.S_ISREG(found.st_mode) else None

    def names(self, folder: str) -> list[str]:
        """See Files."""
        return sorted(os.listdir(self.root / folder)) if self.is_folder(folder) else []

    def is_folder(self, path: str) -> bool:
        """See Files."""
        found = self._status(path)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def same(self, one: str, other: str) -> bool:
        """See Files."""
        first, second = self._status(one), self._status(other)
        return first is not None and second is not None and os.path.samestat(first, second)

    def differing(self, wanted: Sequence[tuple[str, str]], *, stamps: bool = True) -> list[str]:
        """See Files. Hashing releases the interpreter lock, so every core hashes."""

        def fits(pair: tuple[str, str]) -> bool:
            path, sha256 = self.root / pair[0], pair[1]
            if self.size(pair[0]) is None:
                return False
            if stamps and verified.is_verified(path, sha256):
                return True
            before = verified.facts(path) if stamps else {}
            try:
                good = sha256_file(path) == sha256
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return False  # a sector that cannot be read any more
            if good and stamps:
                verified.remember(path, before, sha256)
            return good

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = list(pool.map(fits, wanted))
        return [path for (path, _), good in zip(wanted, found, strict=True) if not good]

    def free_bytes(self) -> int:
        """See Files."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def make_folder(self, path: str) -> None:
        """See Files."""
        with suppress(FileExistsError):
            os.mkdir(self.root / path, 0o755)

    def create(self, path: str, data: bytes) -> None:
        """See Files."""
        self._write(path, data, os.O_CREAT | os.O_TRUNC)

    def append(self, path: str, data: bytes) -> None:
        """See Files."""
        self._write(path, data, os.O_CREAT | os.O_APPEND)

    def sync(self, path: str) -> None:
        """See Files."""
        fsync_file(self.root / path)

    def sync_folder(self, path: str) -> None:
        """See Files."""
        fsync_folder(self.root / path)

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        with verified.same_content(self.root / old):
            os.replace(self.root / old, self.root / new)

    def link(self, old: str, new: str) -> None:
        """See Files."""
        with verified.same_content(self.root / old):
            os.link(self.root / old, self.root / new, follow_symlinks=False)

    def remove(self, path: str) -> None:
        """See Files."""
        with suppress(FileNotFoundError), verified.same_content(self.root / path):
            os.unlink(self.root / path)

    def remove_folder(self, path: str) -> None:
        """See Files."""
        with suppress(FileNotFoundError):
            os.rmdir(self.root / path)

    def _status(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(self.root / path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, path: str, data: bytes, flags: int) -> None:
        fd = os.open(self.root / path, os.O_WRONLY | os.O_NOFOLLOW | flags, FILE_MODE)
        with open(fd, "wb") as out:
            out.write(data)
