# SPDX-License-Identifier: Apache-2.0
"""Calls single ops of the kernel library on NumPy arrays."""

from __future__ import annotations

import ctypes as c
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from alone import alone_in
from numpy.typing import NDArray

from edgecascade.backends._cuda import open_device
from edgecascade.backends._lib import (
    ARGS,
    OVERLAP,
    PAGE_TOKENS,
    Call,
    Library,
    NormArgs,
    Step,
    Stream,
    address,
    cpu_isas,
    cpu_library,
    cuda_library,
    open_cuda_library,
)
from edgecascade.backends.reference import round_to_int8
from edgecascade.ops import OPS, Norm

DECODE, PREFILL = 0, 1
CUDA = "cuda-emulated"  # the CUDA kernels, compiled for the CPU (plugins/cuda/emulator)
GPU = "cuda"  # the same on the GPU of this machine; only where it is asked for
SETS = [*cpu_isas(), CUDA, *([GPU] if os.environ.get("EDGECASCADE_TEST_GPU") == "1" else [])]
ROOT = Path(__file__).resolve().parent.parent
CUDA_EMULATED = ROOT / "build" / "cuda-emulated" / "libedgecascade_cuda_emulated.so"


@cache
def cuda_emulated() -> Library:
    """The CUDA table, built for the emulator where the kernels are built."""
    folder = CUDA_EMULATED.parent
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not found; make setup installs it"
    jobs = str(os.cpu_count() or 1)
    with alone_in(folder):
        for command in (
            [
                cmake,
                "-S",
                str(ROOT / "plugins"),
                "-B",
                str(folder),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            ],
            [cmake, "--build", str(folder), "--target", "edgecascade_cuda_emulated", "-j", jobs],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return open_cuda_library(CUDA_EMULATED)


def _library(isa: str | None) -> Library:
    if isa == CUDA:
        return cuda_emulated()
    return cuda_library() if isa == GPU else cpu_library(isa)


def round_to_half(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as halves times a power of two, as the CUDA kernels multiply them."""
    with np.errstate(invalid="ignore"):
        largest = np.abs(x).max(axis=-1, keepdims=True)
        scale = np.ldexp(np.float32(1), np.frexp(largest)[1])
        halves: NDArray[np.float32] = (x / scale).astype(np.float16) * scale
    return halves


@dataclass(frozen=True)
class Batch:
    """Sequences of one step: their numbers of tokens, slots, and tokens already held."""

    lengths: Sequence[int]
    slots: Sequence[int]
    past: Sequence[int]
    pages: NDArray[np.int32] | None = None  # [slots, max_pages]
    out_rows: Sequence[int] = ()
    live: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def rows(self, sequence: int) -> slice:
        first = sum(self.lengths[:sequence])
        return slice(first, first + self.lengths[sequence])


class Kernels:
    """One instruction set with a pool of threads of its own, or the CUDA kernels."""

    def __init__(self, isa: str | None = None, threads: int = 2) -> None:
        self.cuda = isa in (CUDA, GPU)
        self.device = open_device() if isa == GPU else None
        self.library = _library(isa)
        self.stream: Stream = self.library.stream(threads)
        # Blocks multiply activations of 8 bits here, halves there.
        self.round = round_to_half if self.cuda else round_to_int8
        self.packer = cpu_library() if self.cuda else self.library
        # Steps up to this size give a row the bits that it has alone.
        self.same_bits_rows = 8 if self.cuda else 1 << 30

    def place(self, array: NDArray[Any]) -> int | None:
        """Where the kernels read an array that the caller keeps: itself, or a copy on the GPU."""
        if self.device is None:
            return address(array)
        there = self.device.alloc(array.nbytes)
        self._copy(array, there, back=False)
        return there

    def _copy(self, array: NDArray[Any], there: int, *, back: bool) -> None:
        assert self.device is not None
        assert self.stream.handle is not None
        move = self.device.download if back else lambda a, at, on: self.device.upload(at, a, on)
        if array.nbytes:
            move(array, there, self.stream.handle)
        self.device.synchronize(self.stream.handle)

    def run(self, op: str, phase: int, batch: Batch, **fields: Any) -> None:
        """Run an op. Arrays go by address: they must be contiguous and of the right type."""
        placed: list[tuple[NDArray[Any], int]] = []

        def at(array: NDArray[Any] | None) -> int | None:
            if array is None or self.device is None:
                return address(array)
            if not any(array is other for other, _ in placed):
                placed.append((array, self.place(array) or 0))
            return next(there for other, there in placed if other is array)

        args = ARGS[op]()
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, name
                value = at(value)
            elif isinstance(value, Norm):
                value = NormArgs(at(value.gamma), value.eps, value.groups)
            if value is not None:
                setattr(args, name, value)
        arrays = {
            "start": np.cumsum([0, *batch.lengths], dtype=np.int32),
            "slot": np.array(batch.slots, np.int32),
            "past": np.array(batch.past, np.int32),
            "page_table": batch.pages,
            "out_row": np.array(batch.out_rows, np.int32),
            "live": None if batch.live is None else np.array([batch.live], np.int32),
        }
        step = Step(**{name: at(array) for name, array in arrays.items()})
        step.n_tok, step.n_seq, step.n_out = batch.tokens, len(batch.slots), len(batch.out_rows)
        step.flags = OVERLAP
        step.max_pages = 0 if batch.pages is None else batch.pages.shape[1]
        step.max_context = max(
            (p + n for p, n in zip(batch.past, batch.lengths, strict=True)), default=1
        )
        code = OPS[op].codes[phase]
        calls = (Call * 1)(Call(c.addressof(args), code, 0))
        # All ones are NaN as floats and far outside as indices.
        workspace = np.full(self.library.workspace_size(step, calls) + 256, 255, np.uint8)
        step.workspace, step.workspace_bytes = at(workspace), workspace.nbytes
        self.library.run_op(code, self.stream, step, args)
        for array, there in placed:
            if array is not workspace and array.flags.writeable:
                self._copy(array, there, back=True)

    def close(self) -> None:
        self.stream.close()


def relative(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Frobenius distance over the norm of what is wanted."""
    difference = got.astype(np.float64) - want.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(want.astype(np.float64)))


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal byte by byte: -0 is not 0, and a NaN equals itself."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


__all__ = [
    "CUDA",
    "CUDA_EMULATED",
    "DECODE",
    "PAGE_TOKENS",
    "PREFILL",
    "SETS",
    "Batch",
    "Kernels",
    "relative",
    "same_bits",
]
