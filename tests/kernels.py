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
from numpy.typing import NDArray

from edgecascade.backends._lib import (
    ARGS,
    PAGE_TOKENS,
    Call,
    Library,
    NormArgs,
    Step,
    Stream,
    address,
    cpu_isas,
    cpu_library,
    open_cuda_library,
)
from edgecascade.backends.reference import round_to_int8
from edgecascade.ops import OPS, Norm

DECODE, PREFILL = 0, 1
CUDA = "cuda-emulated"  # the CUDA kernels, compiled for the CPU (plugins/cuda/emulator)
SETS = [*cpu_isas(), CUDA]
ROOT = Path(__file__).resolve().parent.parent


@cache
def cuda_emulated() -> Library:
    """The CUDA table, built for the emulator where the kernels are built."""
    folder = ROOT / "build" / "cuda-emulated"
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not found; make setup installs it"
    jobs = str(os.cpu_count() or 1)
    for command in (
        [cmake, "-S", str(ROOT / "plugins"), "-B", str(folder)],
        [cmake, "--build", str(folder), "--target", "edgecascade_cuda_emulated", "-j", jobs],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return open_cuda_library(folder / "libedgecascade_cuda_emulated.so")


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
        self.cuda = isa == CUDA
        self.library = cuda_emulated() if self.cuda else cpu_library(isa)
        self.stream: Stream = self.library.stream(threads)
        # Blocks multiply activations of 8 bits here, halves there.
        self.round = round_to_half if self.cuda else round_to_int8
        self.packer = cpu_library() if self.cuda else self.library
        # Steps up to this size give a row the bits that it has alone.
        self.same_bits_rows = 8 if self.cuda else 1 << 30

    def run(self, op: str, phase: int, batch: Batch, **fields: Any) -> None:
        """Run an op. Arrays go by address: they must be contiguous and of the right type."""
        args = ARGS[op]()
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, name
                value = address(value)
            elif isinstance(value, Norm):
                value = NormArgs(address(value.gamma), value.eps, value.groups)
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
        step = Step(**{name: address(array) for name, array in arrays.items()})
        step.n_tok, step.n_seq, step.n_out = batch.tokens, len(batch.slots), len(batch.out_rows)
        step.max_pages = 0 if batch.pages is None else batch.pages.shape[1]
        step.max_context = max(
            (p + n for p, n in zip(batch.past, batch.lengths, strict=True)), default=1
        )
        code = OPS[op].codes[phase]
        calls = (Call * 1)(Call(c.addressof(args), code, 0))
        # All ones are NaN as floats and far outside as indices.
        workspace = np.full(self.library.workspace_size(step, calls) + 256, 255, np.uint8)
        step.workspace, step.workspace_bytes = address(workspace), workspace.nbytes
        self.library.run_op(code, self.stream, step, args)

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
    "DECODE",
    "PAGE_TOKENS",
    "PREFILL",
    "SETS",
    "Batch",
    "Kernels",
    "relative",
    "same_bits",
]
