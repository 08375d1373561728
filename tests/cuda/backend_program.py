# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend against the CPU's, in a process whose driver is the stand-in.

    python tests/cuda/backend_program.py STAND_INS KERNELS BUNDLE [KV]

STAND_INS holds libcuda.so.1 (tests/trt/fakecuda.c), KERNELS is the CUDA library for the emulator.
Prints what was seen as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(stand_ins: Path, kernels: Path, folder: Path, kv: str | None = None) -> None:
    driver = ctypes.CDLL(str(stand_ins / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver.fakecuda_late(1)
    os.environ["EDGECASCADE_CUDA_LIBRARY"] = str(kernels)
    from edgecascade.backends import slots
    from edgecascade.backends.base import Options
    from edgecascade.backends.cuda import CudaBackend
    from edgecascade.backends.native import NativeBackend
    from edgecascade.bundle import Bundle

    slots.PREFILL_CHUNK = 32  # several chunks of a prompt are under way at once
    bundle = Bundle.open(folder)
    options = Options(slots=3, max_context=512, kv=kv)
    cuda, cpu = CudaBackend(bundle, options), NativeBackend(bundle, options)
    random = np.random.default_rng(7)
    prompts = [random.integers(0, cpu.vocab, n).astype(np.int32) for n in (1, 37, 70)]
    seen: dict[str, object] = {"name": cuda.name}

    long = random.integers(0, cpu.vocab, 80).astype(np.int32)
    got, want = cuda.logits(long), cpu.logits(long)
    seen["logits"] = distance(got, want)
    seen["margin_flips"] = flips(got, want)

    logits = {slot: (cuda.prefill(slot, p), cpu.prefill(slot, p)) for slot, p in enumerate(prompts)}
    seen["prefill"] = max(distance(a[None], b[None]) for a, b in logits.values())
    tokens = {slot: int(b.argmax()) for slot, (_, b) in logits.items()}
    worst = 0.0
    held = []
    for chosen in ([0, 1, 2], [1, 2], [2], [0, 1, 2], [0, 2], [1]) * 2:
        fed = [tokens[slot] for slot in chosen]
        a, b = cuda.decode(chosen, fed), cpu.decode(chosen, fed)
        worst = max(worst, distance(a, b))
        held.append((a, np.array(a)))
        tokens |= {slot: int(row.argmax()) for slot, row in zip(chosen, b, strict=True)}
    seen["decode"] = worst
    unread = cuda.decode([0, 1, 2], [4, 5, 6])
    later = cuda.decode([0, 1, 2], [7, 8, 9])
    held += [(unread, cpu.decode([0, 1, 2], [4, 5, 6])), (later, cpu.decode([0, 1, 2], [7, 8, 9]))]
    seen["held"] = max(distance(a, b) for a, b in held[-2:])
    seen["kept"] = all(np.array_equal(a, b) for a, b in held[:-2])
    seen["captured"] = cuda.captured
    seen["prefetched"] = prefetched(cuda, bundle, ctypes.CDLL(str(kernels)))

    # One conversation from backend to backend.
    cuda.reset(0)
    cuda.restore(0, cpu.save(1))
    cpu.reset(0)
    cpu.restore(0, cpu.save(1))
    moved = distance(cuda.decode([0], [5]), cpu.decode([0], [5]))
    cpu.restore(2, cuda.save(0))
    seen["moved"] = max(moved, distance(cuda.decode([0], [6]), cpu.decode([2], [6])))
    cuda.reset(0)
    seen["again"] = bool(np.array_equal(cuda.prefill(0, prompts[1]), logits[1][0]))
    cuda.close()
    print(json.dumps(seen))


def prefetched(cuda: Any, bundle: Any, emulated: ctypes.CDLL) -> dict[str, list[int]]:
    """Of each weight, by the last part of its name: lines that a decode step brought into the L2,
    and as many as it has, of all layers.
    """
    count = emulated.ec_emulated_prefetches
    count.argtypes, count.restype = [ctypes.c_uint64, ctypes.c_uint64], ctypes.c_uint64
    count(0, 2**64 - 1)
    cuda.decode([0], [5])
    cuda._device.synchronize(cuda._stream)
    seen: dict[str, list[int]] = {}
    for name, at in cuda._weights.items():
        size = bundle.tensors[name].bytes
        lines = seen.setdefault(name.rpartition(".")[2], [0, 0])
        lines[0] += count(at, size)
        lines[1] += size // 128
    return seen


def distance(got: Any, want: Any) -> float:
    """Relative Frobenius distance of centred logits, the median of the rows."""
    got, want = map(np.asarray, (got, want))
    got, want = (rows - rows.mean(axis=1, keepdims=True) for rows in (got, want))
    rows = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return float(np.median(rows))


def flips(got: np.ndarray, want: np.ndarray) -> int:
    """Rows whose best token differs although its lead is far above the row's error."""
    top = np.sort(want, axis=1)
    lead = top[:, -1] - top[:, -2]
    error = np.sqrt(np.mean((got - want) ** 2, axis=1))
    return int(((got.argmax(axis=1) != want.argmax(axis=1)) & (lead > 4 * error)).sum())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
