# SPDX-License-Identifier: Apache-2.0
"""The download of an update: the differences that fit the blobs here, then what remains, whole."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from edgecascade.errors import DownloadFailed, FleetError
from edgecascade.fleet import delta as deltas
from edgecascade.fleet.fetch import Blob, Downloader, DownloadStopped, Pace
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.release import DeltaRef, Release
from edgecascade.fleet.sources import Patience, Source
from edgecascade.fleet.store import MARGIN_BYTES

log = logging.getLogger(__name__)


class UpdateDownload:
    """Puts blobs into `partial` of the device's folder; `keep` takes over each that is whole.

    `on_bytes` hears how many bytes have come in all; fewer than before once some were wrong.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        pace: Pace,
        patience: Patience,
        keep: Callable[[str], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._folder, self._sources, self._pace, self._patience = folder, sources, pace, patience
        self._keep, self._on_bytes = keep, on_bytes
        self._partial = folder / "partial"
        self._came = 0
        self._lock = threading.Lock()
        self._stopped = False
        self._loader: Downloader | None = None

    def stop(self) -> None:
        """End the download that runs, or the next one at its start."""
        with self._lock:
            self._stopped = True
            if self._loader is not None:
                self._loader.stop()

    def run(self, release: Release, missing: Mapping[str, int]) -> None:
        """Get these blobs, of these sizes."""
        made = self._differences(release, missing)
        blobs = [Blob(sha256, size) for sha256, size in missing.items() if sha256 not in made]
        self._fetch(blobs, lambda blob, path: self._keep(blob.sha256))

    def _differences(self, release: Release, missing: Mapping[str, int]) -> set[str]:
        """Make what can be made of blobs that are here; the blobs that could be made."""
        chosen = self._chosen(release, missing)
        made: set[str] = set()

        def keep(blob: Blob, path: Path) -> None:
            for target, each in chosen.items():
                if each.sha256 == blob.sha256 and self._restore(each, path, missing[target]):
                    self._keep(target)
                    made.add(target)
            path.unlink()

        try:
            self._fetch([Blob(each.sha256, each.size) for each in chosen.values()], keep)
        except DownloadFailed as error:
            log.warning("fetching whole blobs instead of differences: %s", error)
            self._drop(release)
        return made

    def _chosen(self, release: Release, missing: Mapping[str, int]) -> dict[str, DeltaRef]:
        """The smallest difference for each blob, while there is room for it beside all blobs."""
        files, best = RealFiles(self._folder), dict[str, DeltaRef]()
        for each in release.deltas:
            better = each.target not in best or each.size < best[each.target].size
            if each.target in missing and files.size(f"blobs/{each.base}") is not None and better:
                best[each.target] = each

        def lacking(sha256: str, size: int) -> int:
            return size - (files.size(f"partial/{sha256}") or 0)

        spare = files.free_bytes() - MARGIN_BYTES - sum(lacking(*each) for each in missing.items())
        chosen: dict[str, DeltaRef] = {}
        for target, each in best.items():
            need = lacking(each.sha256, each.size)
            if need <= spare:
                chosen[target] = each
                spare -= need
        self._drop(release, keep={each.sha256 for each in chosen.values()})
        return chosen

    def _drop(self, release: Release, keep: Collection[str] = ()) -> None:
        """Give the room back that differences have taken: the whole blobs need it."""
        for each in release.deltas:
            self._restored(each).unlink(missing_ok=True)
            if each.sha256 not in keep:
                (self._partial / each.sha256).unlink(missing_ok=True)

    def _restored(self, each: DeltaRef) -> Path:
        return self._partial / f"{each.target}.restored"

    def _restore(self, each: DeltaRef, path: Path, size: int) -> bool:
        part = self._restored(each)
        try:
            with open(part, "wb") as out:
                base = self._folder / "blobs" / each.base
                deltas.restore(base, path, size, each.target, out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, self._partial / each.target)
            return True
        except (FleetError, OSError) as error:
            log.warning("fetching blob %s as a whole: %s", each.target, error)
            part.unlink(missing_ok=True)
            return False

    def _fetch(self, blobs: list[Blob], keep: Callable[[Blob, Path], None]) -> None:
        if not blobs:
            return
        loader = Downloader(
            self._partial,
            self._sources,
            pace=self._pace,
            patience=self._patience,
            on_bytes=self._count,
        )
        with self._lock:
            if self._stopped:
                raise DownloadStopped("halted")
            self._loader = loader
        loader.fetch(blobs, keep)

    def _count(self, more: int) -> None:
        with self._lock:
            self._came += more
            came = self._came
        self._on_bytes(came)
