# SPDX-License-Identifier: Apache-2.0
"""`Files` that say what is about to happen, and leave out what they are told to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from edgecascade.fleet.faults.sim import SimFiles, SimFolder
from edgecascade.fleet.fs import Files, RealFiles

Before = Callable[[str], None]


class Watched:
    """Passes everything on to other files; `before` is called with each effect's name first.

    Effects that match `skip` are not performed: this is how a safety step is taken away. `reads`
    says whether reading is an effect, too. Nothing is taken for verified because it once was.
    """

    def __init__(
        self, files: Files, before: Before = lambda effect: None, *, reads: bool = False
    ) -> None:
        self.files = files
        self.before = before
        self.reads = reads
        self.skip: re.Pattern[str] | None = None

    def read(self, path: str, limit: int) -> bytes | None:
        """See Files."""
        self._look(f"read {path}")
        return self.files.read(path, limit)

    def size(self, path: str) -> int | None:
        """See Files."""
        return self.files.size(path)

    def names(self, folder: str) -> list[str]:
        """See Files."""
        self._look(f"names {folder}")
        return self.files.names(folder)

    def is_folder(self, path: str) -> bool:
        """See Files."""
        return self.files.is_folder(path)

    def same(self, one: str, other: str) -> bool:
        """See Files."""
        return self.files.same(one, other)

    def differing(self, wanted: Sequence[tuple[str, str]], *, stamps: bool = True) -> list[str]:
        """See Files."""
        self._look(f"differing {wanted[0][0] if wanted else ''}")
        return self.files.differing(wanted, stamps=False)

    def free_bytes(self) -> int:
        """See Files."""
        return self.files.free_bytes()

    def make_folder(self, path: str) -> None:
        """See Files."""
        if self._goes(f"make_folder {path}"):
            self.files.make_folder(path)

    def create(self, path: str, data: bytes) -> None:
        """See Files."""
        if self._goes(f"create {path}"):
            self.files.create(path, data)

    def append(self, path: str, data: bytes) -> None:
        """See Files."""
        if self._goes(f"append {path}"):
            self.files.append(path, data)

    def sync(self, path: str) -> None:
        """See Files."""
        if self._goes(f"sync {path}"):
            self.files.sync(path)

    def sync_folder(self, path: str) -> None:
        """See Files."""
        if self._goes(f"sync_folder {path}"):
            self.files.sync_folder(path)

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        if self._goes(f"rename {old} {new}"):
            self.files.rename(old, new)

    def link(self, old: str, new: str) -> None:
        """See Files."""
        if self._goes(f"link {old} {new}"):
            self.files.link(old, new)

    def remove(self, path: str) -> None:
        """See Files."""
        if self._goes(f"remove {path}"):
            self.files.remove(path)

    def remove_folder(self, path: str) -> None:
        """See Files."""
        if self._goes(f"remove_folder {path}"):
            self.files.remove_folder(path)

    def _goes(self, effect: str) -> bool:
        if self.skip is not None and self.skip.fullmatch(effect):
            return False
        self.before(effect)
        return True

    def _look(self, effect: str) -> None:
        if self.reads:
            self.before(effect)


def write_out(files: SimFiles, folder: Path) -> None:
    """What lies in memory as a folder of this machine, hard links included."""
    real = RealFiles(folder)
    first: dict[int, str] = {}
    folder.mkdir(exist_ok=True)

    def write(number: int, path: str) -> None:
        inode = files.inodes[number]
        if isinstance(inode, SimFolder):
            for name, child in inode.seen.items():
                where = f"{path}/{name}" if path else name
                if isinstance(files.inodes[child], SimFolder):
                    real.make_folder(where)
                write(child, where)
        elif number in first:
            real.link(first[number], path)
        else:
            real.create(path, inode.seen)
            first[number] = path

    write(1, "")
