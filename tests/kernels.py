# SPDX-License-Identifier: Apache-2.0
"""Calls single ops of the kernel library on NumPy arrays."""

from __future__ import annotations

import ctypes as c
import mmap
import os
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import terminal
from alone import alone_in
from numpy.typing import DTypeLike, NDArray

from edgecascade.backends._cuda import open_device
from edgecascade.backends._lib import (
    ARGS,
    OVERLAP,
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
from edgecascade.tensors import PAGE_TOKENS

DECODE, PREFILL = 0, 1
CUDA = "cuda-emulated"  # the CUDA kernels, compiled for the CPU (plugins/cuda/emulator)
MAP_NORESERVE = 0x4000  # Linux; Python 3.10 has no name for it
GPU = "cuda"  # the same on the GPU of this machine; only where it is asked for
HOST_SETS = [*cpu_isas(), CUDA]  # whose memory is this process's
SETS = [*HOST_SETS, *([GPU] if os.environ.get("EDGECASCADE_TEST_GPU") == "1" else [])]
ROOT = Path(__file__).resolve().parent.parent
WATCHED = os.environ.get("EDGECASCADE_TEST_RACES") == "1"  # for data races, which takes its time
_LIBRARY = "edgecascade_cuda_watched" if WATCHED else "edgecascade_cuda_emulated"
CUDA_EMULATED = ROOT / "build" / "cuda-emulated" / f"lib{_LIBRARY}.so"


@cache
def build_emulated(target: str) -> Path:
    """A program or library of plugins/cuda/emulator, in the folder of CUDA_EMULATED."""
    folder = CUDA_EMULATED.parent
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not found; make setup installs it"
    places = [f"-DCMAKE_{kind}_OUTPUT_DIRECTORY={folder}" for kind in ("LIBRARY", "RUNTIME")]
    jobs = str(os.cpu_count() or 1)
    with alone_in(folder):
        for command in (
            [cmake, "-S", str(ROOT / "plugins"), "-B", str(folder), *places],
            [cmake, "--build", str(folder), "--target", target, "-j", jobs],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return folder / target


@cache
def cuda_emulated() -> Library:
    """The CUDA table, built for the emulator where the kernels are built."""
    build_emulated(_LIBRARY)
    c.CDLL(str(CUDA_EMULATED)).ec_emulated_say_to(terminal.stderr)
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


class _DeviceMemory:
    """Arrays in the memory of this machine's GPU."""

    def __init__(self, stream: Stream) -> None:
        self._device = open_device()
        self._stream = stream.handle or 0

    def put(self, array: NDArray[Any], name: str) -> int:
        """The address of a copy."""
        there = self._device.alloc(array.nbytes)
        if array.nbytes:
            self._device.upload(there, array, self._stream)
        self._device.synchronize(self._stream)
        return there

    def fetch(self, there: int, array: NDArray[Any]) -> None:
        """What has become of it."""
        if array.nbytes:
            self._device.download(array, there, self._stream)
        self._device.synchronize(self._stream)

    def free(self, there: int) -> None:
        """It goes with the process."""


class _FencedMemory:
    """Likewise in memory of the emulator, where an access beyond the array is a fault."""

    def __init__(self) -> None:
        library = c.CDLL(str(CUDA_EMULATED))
        self._alloc, self._free = library.ec_emulated_alloc, library.ec_emulated_free
        self._alloc.argtypes, self._alloc.restype = [c.c_uint64, c.c_char_p], c.c_void_p
        self._free.argtypes, self._free.restype = [c.c_void_p], None

    def put(self, array: NDArray[Any], name: str) -> int:
        there = int(self._alloc(array.nbytes, name.encode()))
        c.memmove(there, address(array), array.nbytes)
        return there

    def fetch(self, there: int, array: NDArray[Any]) -> None:
        c.memmove(address(array), there, array.nbytes)

    def free(self, there: int) -> None:
        self._free(there)


def sparse(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that take memory only where they are touched, however many there are. By their address
    the kernels take them where they are.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags), dtype).reshape(shape)


class _Arrays:
    """Where the arrays of one call are: with their owner, or in memory that the call gives back."""

    def __init__(
        self, op: str, memory: _DeviceMemory | _FencedMemory | None, placed: ExitStack
    ) -> None:
        self._op, self._memory, self._placed = op, memory, placed
        self._known: list[tuple[NDArray[Any], int]] = []

    def at(self, array: NDArray[Any] | None, name: str) -> int | None:
        """Of an array, which is placed once however often it is asked for."""
        if array is None or self._memory is None:
            return address(array)
        if not any(array is other for other, _ in self._known):
            there = self._memory.put(array, f"{self._op}.{name}")
            self._placed.callback(self._memory.free, there)
            self._known.append((array, there))
        return next(there for other, there in self._known if other is array)

    def fetch(self) -> None:
        """The call is over: its arrays are what it made of them."""
        for array, there in self._known:
            if self._memory is not None and array.flags.writeable:
                self._memory.fetch(there, array)


class Kernels:
    """One instruction set with a pool of threads of its own, or the CUDA kernels."""

    def __init__(self, isa: str | None = None, threads: int = 2) -> None:
        self.cuda = isa in (CUDA, GPU)
        self.library = _library(isa)
        self.stream: Stream = self.library.stream(threads)
        self._memory: _DeviceMemory | _FencedMemory | None = None  # if not the caller's
        if self.cuda:
            self._memory = _DeviceMemory(self.stream) if isa == GPU else _FencedMemory()
        # Blocks multiply activations of 8 bits here, halves there.
        self.round = round_to_half if self.cuda else round_to_int8
        self.packer = cpu_library() if self.cuda else self.library
        # Steps up to this size give a row the bits that it has alone.
        self.same_bits_rows = 8 if self.cuda else 1 << 30

    def place(self, array: NDArray[Any], name: str = "what the test placed") -> int | None:
        """Where the kernels read an array that the caller keeps: itself, or a copy."""
        if self._memory is None:
            return address(array)
        there = self._memory.put(array, name)
        weakref.finalize(array, self._memory.free, there).atexit = False
        return there

    def run(self, op: str, phase: int, batch: Batch, **fields: Any) -> None:
        """Run an op. Arrays go by address: they must be contiguous and of the right type."""
        with ExitStack() as placed:
            self._run(_Arrays(op, self._memory, placed), op, phase, batch, fields)

    def _run(
        self, arrays: _Arrays, op: str, phase: int, batch: Batch, fields: dict[str, Any]
    ) -> None:
        args = ARGS[op]()
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, name
                value = arrays.at(value, name)
            elif isinstance(value, Norm):
                value = NormArgs(arrays.at(value.gamma, name), value.eps, value.groups)
            if value is not None:
                setattr(args, name, value)
        of_step = {
            "start": np.cumsum([0, *batch.lengths], dtype=np.int32),
            "slot": np.array(batch.slots, np.int32),
            "past": np.array(batch.past, np.int32),
            "page_table": batch.pages,
            "out_row": np.array(batch.out_rows, np.int32),
            "live": None if batch.live is None else np.array([batch.live], np.int32),
        }
        step = Step(**{name: arrays.at(array, name) for name, array in of_step.items()})
        step.n_tok, step.n_seq, step.n_out = batch.tokens, len(batch.slots), len(batch.out_rows)
        step.flags = OVERLAP
        step.max_pages = 0 if batch.pages is None else batch.pages.shape[1]
        step.max_context = max(
            (p + n for p, n in zip(batch.past, batch.lengths, strict=True)), default=1
        )
        code = OPS[op].codes[phase]
        calls = (Call * 1)(Call(c.addressof(args), code, 0))
        # All ones are NaN as floats and far outside as indices.
        workspace = np.full(self.library.workspace_size(step, calls), 255, np.uint8)
        step.workspace = arrays.at(workspace, "workspace")
        step.workspace_bytes = workspace.nbytes
        self.library.run_op(code, self.stream, step, args)
        arrays.fetch()

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
    "HOST_SETS",
    "PAGE_TOKENS",
    "PREFILL",
    "SETS",
    "Batch",
    "Kernels",
    "relative",
    "same_bits",
    "sparse",
]
