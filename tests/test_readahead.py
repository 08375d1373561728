# SPDX-License-Identifier: Apache-2.0
"""Read-ahead fills the page cache, ends when told to, and harms nobody when a file goes away."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from edgecascade.backends import readahead
from edgecascade.backends.readahead import ReadAhead, cached_share


def dropped(path: Path) -> bool:
    """Push a file out of the page cache; False where the file system keeps it (tmpfs)."""
    with open(path, "rb") as source:
        os.fsync(source.fileno())
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path) < 0.5


def big_file(path: Path, mebibytes: int = 48) -> Path:
    with open(path, "wb") as out:
        for _ in range(mebibytes):
            out.write(os.urandom(1 << 20))
        out.flush()
        os.fsync(out.fileno())
    return path


def test_a_file_just_written_needs_no_reading(tmp_path: Path) -> None:
    path = big_file(tmp_path / "weights")
    assert cached_share(path) == 1.0
    assert ReadAhead.of([path]) is None


def test_a_cold_file_is_cached_afterwards(tmp_path: Path) -> None:
    path = big_file(tmp_path / "weights")
    if not dropped(path):
        pytest.skip("this file system keeps its files in memory")
    reading = ReadAhead.of([path])
    assert reading is not None
    assert reading.wait(60)
    assert cached_share(path) == 1.0
    reading.stop()


def test_nothing_is_read_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = big_file(tmp_path / "weights", 2)
    monkeypatch.setattr(readahead, "cached_share", lambda path: 0.0)
    monkeypatch.setattr(readahead, "memory_bytes", lambda: 1 << 20)
    assert ReadAhead.of([path]) is None


def test_stop_ends_the_thread_before_the_files_end(tmp_path: Path) -> None:
    path = big_file(tmp_path / "weights")
    before = threading.active_count()
    reading = ReadAhead([path] * 5000)
    reading.stop()
    assert threading.active_count() == before


def test_a_file_that_went_away_ends_it_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = ReadAhead([tmp_path / "gone"])
    assert reading.wait(60)
    assert "read-ahead of" in caplog.text


def test_an_empty_file_counts_as_cached(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") == 1.0
