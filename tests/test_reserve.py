# SPDX-License-Identifier: Apache-2.0
"""Memory that is reserved: zeroed, apart, given back, and in huge pages where there are any."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from edgecascade.errors import OutOfMemory
from edgecascade.reserve import ALIGN_BYTES, HUGE_BYTES, reserve, reserve_all

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def in_huge_pages() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^AnonHugePages:\s+(\d+) kB", text, re.MULTILINE)[1]) << 10


def test_arrays_are_zeroed_aligned_and_apart() -> None:
    wanted = [((3, 5), np.float32), ((0,), np.int32), ((7,), np.int8), ((2, 2), np.float16)]
    arrays = reserve_all(wanted)
    for number, (array, (shape, dtype)) in enumerate(zip(arrays, wanted, strict=True)):
        assert (array.shape, array.dtype) == (shape, dtype)
        assert not array.any()
        assert array.flags.writeable
        assert array.ctypes.data % ALIGN_BYTES == 0
        array[...] = number + 1
    assert all((array == number + 1).all() for number, array in enumerate(arrays))


def test_what_is_not_touched_costs_nothing_and_what_is_dropped_is_given_back() -> None:
    before = resident()
    array = reserve((1 << 30,), np.uint8)
    assert resident() - before < 20 << 20
    array[: 64 << 20] = 1
    assert resident() - before > 60 << 20
    del array
    assert resident() - before < 20 << 20


def test_more_than_there_are_addresses_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="cannot be reserved"):
        reserve((1 << 55,), np.uint8)


def test_many_small_states_are_not_many_mappings() -> None:
    before = len(Path("/proc/self/maps").read_text().splitlines())
    kept = [reserve_all([((9_000,), np.uint8), ((90, 100), np.float32)]) for _ in range(2000)]
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before < 200
    assert len(kept) == 2000


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="a kernel without huge pages"
)
def test_large_arrays_lie_in_huge_pages() -> None:
    before = in_huge_pages()
    array = reserve((16 * HUGE_BYTES,), np.uint8)
    assert array.ctypes.data % HUGE_BYTES == 0
    array[:] = 1
    assert in_huge_pages() - before >= HUGE_BYTES  # 16 of them, unless memory is in pieces
