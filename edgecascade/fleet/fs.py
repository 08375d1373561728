# SPDX-License-Identifier: Apache-2.0
"""Every file that a device's updates touch goes through `Files`: the disk, or a test's idea of one.

Paths are relative to the device's folder and use "/". Each method that changes something is one
effect: a power cut falls before or after it, never beside it.
"""

from __future__ import annotations

from typing import Protocol


class Files(Protocol):
    """A folder tree with the promises of a POSIX file system, and no more."""

    def read(self, path: str, limit: int) -> bytes | None:
        """A file's content, None when it is absent; OSError when it has more than `limit` bytes."""

    def size(self, path: str) -> int | None:
        """Size of a regular file; None for anything else."""

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; empty when it is absent."""

    def digest(self, path: str, *, trust_stamps: bool = True) -> str | None:
        """SHA-256 of a regular file; None for anything else."""

    def free_bytes(self) -> int:
        """What an unprivileged writer may still write."""

    def make_folder(self, path: str) -> None:
        """Make a folder, unless it is there."""

    def create(self, path: str, data: bytes) -> None:
        """Write a file anew; nothing is durable yet."""

    def append(self, path: str, data: bytes) -> None:
        """Write at a file's end; nothing is durable yet."""

    def sync(self, path: str) -> None:
        """Wait until a file's data are on the disk."""

    def sync_folder(self, path: str) -> None:
        """Wait until a folder's names are on the disk."""

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name, replacing a file."""

    def link(self, old: str, new: str) -> None:
        """Give a file a second name."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with the files in it; nothing if it is absent."""
