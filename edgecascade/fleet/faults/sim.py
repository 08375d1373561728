# SPDX-License-Identifier: Apache-2.0
"""A file system in memory that keeps apart what is durable and what a power cut may take.

Stricter than ext4: the names of one folder may be lost from any point on, or singly; the data of a
file that was not synced may be old, new, torn, or zeros. Weaker than a disk that lies: what was
synced is there.
"""

from __future__ import annotations

import errno
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Entries = dict[str, int]  # name -> inode
ROOT = 1
ENDLESS = 1 << 40  # bytes: a disk on which nobody counts


@dataclass
class SimFile:
    """A regular file: what is on the disk, and what a reader sees."""

    durable: bytes = b""
    seen: bytes = b""


@dataclass
class SimFolder:
    """A folder; `pending` are the changes of names since the last sync, in order."""

    durable: Entries = field(default_factory=dict)
    seen: Entries = field(default_factory=dict)
    pending: list[tuple[tuple[str, int | None], ...]] = field(default_factory=list)


class SimFiles:
    """`Files` in memory. `before` is called at each effect, with its name."""

    def __init__(self, capacity_bytes: int = ENDLESS) -> None:
        self.inodes: dict[int, SimFile | SimFolder] = {ROOT: SimFolder()}
        self.capacity_bytes = capacity_bytes
        self.before: Callable[[str], None] | None = None

    def read(self, path: str, limit: int) -> bytes | None:
        """See Files."""
        file = self._get(path)
        good = isinstance(file, SimFile) and len(file.seen) <= limit
        return file.seen if good and isinstance(file, SimFile) else None

    def size(self, path: str) -> int | None:
        """See Files."""
        file = self._get(path)
        return len(file.seen) if isinstance(file, SimFile) else None

    def names(self, folder: str) -> list[str]:
        """See Files."""
        found = self._get(folder)
        return sorted(found.seen) if isinstance(found, SimFolder) else []

    def is_folder(self, path: str) -> bool:
        """See Files."""
        return isinstance(self._get(path), SimFolder)

    def same(self, one: str, other: str) -> bool:
        """See Files."""
        first = self._number(one)
        return first is not None and first == self._number(other)

    def differing(self, wanted: Sequence[tuple[str, str]], *, stamps: bool = True) -> list[str]:
        """See Files; nothing is remembered here."""

        def fits(path: str, sha256: str) -> bool:
            file = self._get(path)
            return isinstance(file, SimFile) and hashlib.sha256(file.seen).hexdigest() == sha256

        return [path for path, sha256 in wanted if not fits(path, sha256)]

    def free_bytes(self) -> int:
        """See Files."""
        return self.capacity_bytes - self.used_bytes()

    def used_bytes(self) -> int:
        """What all files hold that have a name."""
        files = (self.inodes[number] for number in set(self._reachable()))
        return sum(len(file.seen) for file in files if isinstance(file, SimFile))

    def make_folder(self, path: str) -> None:
        """See Files."""
        if self._number(path) is None:
            self._effect(f"make_folder {path}")
            self._name(path, self._new(SimFolder()))

    def create(self, path: str, data: bytes) -> None:
        """See Files."""
        self._effect(f"create {path}")
        self._write(path, data)

    def append(self, path: str, data: bytes) -> None:
        """See Files."""
        self._effect(f"append {path}")
        file = self._get(path)
        self._write(path, (file.seen if isinstance(file, SimFile) else b"") + data)

    def sync(self, path: str) -> None:
        """See Files."""
        self._effect(f"sync {path}")
        file = self._existing(path)
        if isinstance(file, SimFile):
            file.durable = file.seen

    def sync_folder(self, path: str) -> None:
        """See Files."""
        self._effect(f"sync_folder {path}")
        folder = self._existing(path)
        if isinstance(folder, SimFolder):
            folder.durable, folder.pending = dict(folder.seen), []

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        self._effect(f"rename {old} {new}")
        number = self._number(old)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, "absent", old)
        (source, old_name), (target, new_name) = self._place(old), self._place(new)
        replaced = target.seen.get(new_name)
        if isinstance(self.inodes.get(replaced or 0), SimFolder):
            raise IsADirectoryError(errno.EISDIR, "a folder is in the way", new)
        if source is target:  # one change of one folder: both names or neither
            self._change(source, (old_name, None), (new_name, number))
        else:
            self._change(target, (new_name, number))
            self._change(source, (old_name, None))

    def link(self, old: str, new: str) -> None:
        """See Files."""
        self._effect(f"link {old} {new}")
        number = self._number(old)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, "absent", old)
        if self._number(new) is not None:
            raise FileExistsError(errno.EEXIST, "exists", new)
        self._name(new, number)

    def remove(self, path: str) -> None:
        """See Files."""
        if self._number(path) is not None:
            self._effect(f"remove {path}")
            folder, name = self._place(path)
            self._change(folder, (name, None))

    def remove_folder(self, path: str) -> None:
        """See Files."""
        if self.names(path):
            raise OSError(errno.ENOTEMPTY, "not empty", path)
        self.remove(path)

    def copy(self) -> SimFiles:
        """The same, after a power cut that lost nothing."""
        return self._after({}, {})

    def power_cuts(self, rng: random.Random, most: int) -> Iterator[SimFiles]:
        """What a power cut may leave now: at most so many of all possible states, by chance."""
        folders = {number: _losses(f) for number, f in self.inodes.items() if _is_open(f)}
        files = {n: _tears(f) for n, f in self.inodes.items() if _is_dirty(f)}
        sizes = [*map(len, folders.values()), *map(len, files.values())]
        number = math.prod(sizes)
        chosen = range(number) if number <= most else sorted(rng.sample(range(number), most))
        for index in chosen:
            names, index = _pick(folders, index)
            data, _ = _pick(files, index)
            yield self._after(names, data)

    def _after(self, names: dict[int, Entries], data: dict[int, bytes]) -> SimFiles:
        """A new file system that holds what survived."""
        after = SimFiles(self.capacity_bytes)
        for number, inode in self.inodes.items():
            if isinstance(inode, SimFolder):
                entries = names.get(number, inode.seen)
                after.inodes[number] = SimFolder(dict(entries), dict(entries))
            else:
                left = data.get(number, inode.seen)
                after.inodes[number] = SimFile(left, left)
        after.inodes = {number: after.inodes[number] for number in {ROOT, *after._reachable()}}
        return after

    def _reachable(self) -> Iterator[int]:
        todo = [ROOT]
        while todo:
            inode = self.inodes[todo.pop()]
            if isinstance(inode, SimFolder):
                yield from inode.seen.values()
                todo.extend(inode.seen.values())

    def _effect(self, name: str) -> None:
        if self.before is not None:
            self.before(name)

    def _number(self, path: str) -> int | None:
        number: int | None = ROOT
        for name in path.split("/") if path else []:
            folder = self.inodes.get(number or 0)
            number = folder.seen.get(name) if isinstance(folder, SimFolder) else None
        return number

    def _get(self, path: str) -> SimFile | SimFolder | None:
        return self.inodes.get(self._number(path) or 0)

    def _existing(self, path: str) -> SimFile | SimFolder:
        found = self._get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "absent", path)
        return found

    def _place(self, path: str) -> tuple[SimFolder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._existing(parent)
        if not isinstance(folder, SimFolder):
            raise NotADirectoryError(errno.ENOTDIR, "no folder", parent)
        return folder, name

    def _new(self, inode: SimFile | SimFolder) -> int:
        number = max(self.inodes) + 1
        self.inodes[number] = inode
        return number

    def _name(self, path: str, number: int) -> None:
        folder, name = self._place(path)
        self._change(folder, (name, number))

    def _change(self, folder: SimFolder, *changes: tuple[str, int | None]) -> None:
        folder.pending.append(changes)
        _apply(folder.seen, changes)

    def _write(self, path: str, data: bytes) -> None:
        file = self._get(path)
        if not isinstance(file, SimFile):
            file = SimFile()
            self._name(path, self._new(file))
        more = len(data) - len(file.seen)
        if self.capacity_bytes < ENDLESS and self.free_bytes() < more:
            raise OSError(errno.ENOSPC, "no room", path)
        file.seen = data


def _is_open(inode: SimFile | SimFolder) -> bool:
    return isinstance(inode, SimFolder) and bool(inode.pending)


def _is_dirty(inode: SimFile | SimFolder) -> bool:
    return isinstance(inode, SimFile) and inode.durable != inode.seen


def _apply(entries: Entries, changes: tuple[tuple[str, int | None], ...]) -> None:
    for name, number in changes:
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def _losses(inode: SimFile | SimFolder) -> list[Entries]:
    """What a folder may hold: the changes up to some point, or all but one."""
    assert isinstance(inode, SimFolder)
    changes = inode.pending
    kept = [changes[:k] for k in range(len(changes) + 1)]
    kept += [changes[:k] + changes[k + 1 :] for k in range(len(changes) - 1)]
    states: list[Entries] = []
    for done in kept:
        entries = dict(inode.durable)
        for change in done:
            _apply(entries, change)
        if entries not in states:
            states.append(entries)
    return states


def _tears(inode: SimFile | SimFolder) -> list[bytes]:
    """What a file may hold that was written and not synced."""
    assert isinstance(inode, SimFile)
    old, new = inode.durable, inode.seen
    half = new[: len(new) // 2]
    return list(dict.fromkeys([old, new, half, half.ljust(len(new), b"\0"), bytes(len(new))]))


def _pick(options: dict[int, list[T]], index: int) -> tuple[dict[int, T], int]:
    """The choice of this number, and what is left of the number for other choices."""
    chosen: dict[int, T] = {}
    for number, each in options.items():
        index, which = divmod(index, len(each))
        chosen[number] = each[which]
    return chosen, index
