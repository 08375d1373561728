# SPDX-License-Identifier: Apache-2.0
"""Memory that costs nothing until it is touched, in huge pages where the kernel has them.

A conversation's keys and values are read after other work has driven their addresses out of the
processor's tables; with pages of 4 KB each of them is looked up again, at more than the cost of the
arithmetic (docs/speed.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import OutOfMemory
from edgecascade.tensors import round_up

Array = NDArray[Any]
Shape = tuple[int, ...]

HUGE_BYTES = 2 << 20  # a huge page, where a page has 4 KB
ALIGN_BYTES = 64  # a cache line


def reserve(shape: Shape, dtype: Any) -> Array:
    """A zeroed array. Raises OutOfMemory when there is no room for its addresses."""
    return reserve_all([(shape, dtype)])[0]


def reserve_all(wanted: Sequence[tuple[Shape, Any]]) -> list[Array]:
    """Zeroed arrays side by side, so that small ones share huge pages. They are freed together."""
    starts, total = [], 0
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in wanted]
    for size in sizes:
        starts.append(total)
        total += round_up(size, ALIGN_BYTES)
    memory = _map(total)
    return [
        memory[start : start + size].view(dtype).reshape(shape)
        for (shape, dtype), start, size in zip(wanted, starts, sizes, strict=True)
    ]


def _map(size: int) -> NDArray[np.uint8]:
    """So many zeroed bytes; at the start of a huge page if they fill one."""
    if size < HUGE_BYTES:  # from the heap: a process has only so many mappings
        small = np.zeros(size + ALIGN_BYTES, np.uint8)
        return _aligned(small, size, ALIGN_BYTES)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        mapped = mmap.mmap(-1, size + HUGE_BYTES, flags=flags)
    except OSError as error:
        raise OutOfMemory(f"{size / 1e9:.2f} GB cannot be reserved: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(np.frombuffer(mapped, np.uint8), size, HUGE_BYTES)


def _aligned(memory: NDArray[np.uint8], size: int, to: int) -> NDArray[np.uint8]:
    skip = -memory.ctypes.data % to
    return memory[skip : skip + size]
