# SPDX-License-Identifier: Apache-2.0
"""The kernel library through ctypes: structs from the op table, statuses turned into errors."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import BackendError, BackendUnavailable, InvalidRequest
from edgecascade.ops import OPS, Field, Kind, Op
from edgecascade.tensors import Codec

ABI_VERSION = 1
OP_COUNT = 9
SOURCE_TYPES = {"f32": 0, "f16": 1, "bf16": 2}
LIBRARY = Path(__file__).parent.parent / "_lib" / "libedgecascade_cpu.so"
CUDA_LIBRARY = LIBRARY.with_name("libedgecascade_cuda.so")


class Weight(c.Structure):
    """ec_weight."""

    _fields_ = [
        ("data", c.c_void_p),
        ("expert_stride", c.c_uint64),
        ("n", c.c_int32),
        ("k", c.c_int32),
        ("type", c.c_int32),
        ("experts", c.c_int32),
    ]


class NormArgs(c.Structure):
    """ec_norm."""

    _fields_ = [("gamma", c.c_void_p), ("eps", c.c_float), ("groups", c.c_int32)]


OVERLAP, PREFETCH = 1, 2  # ec_step_flag


class Step(c.Structure):
    """ec_step."""

    _fields_ = [
        ("live", c.c_void_p),
        ("start", c.c_void_p),
        ("slot", c.c_void_p),
        ("past", c.c_void_p),
        ("page_table", c.c_void_p),
        ("out_row", c.c_void_p),
        ("workspace", c.c_void_p),
        ("workspace_bytes", c.c_size_t),
        ("n_tok", c.c_int32),
        ("n_seq", c.c_int32),
        ("n_out", c.c_int32),
        ("max_pages", c.c_int32),
        ("max_context", c.c_int32),
        ("flags", c.c_int32),
    ]


class Sampling(c.Structure):
    """ec_sampling."""

    _fields_ = [
        ("seen", c.c_void_p),
        ("count", c.c_void_p),
        ("temperature", c.c_float),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
        ("repetition", c.c_float),
        ("presence", c.c_float),
        ("frequency", c.c_float),
        ("top_k", c.c_int32),
        ("n_seen", c.c_int32),
    ]


class Call(c.Structure):
    """ec_call."""

    _fields_ = [("args", c.c_void_p), ("op", c.c_int32), ("reserved", c.c_int32)]


class Device(c.Structure):
    """ec_device."""

    _fields_ = [
        ("name", c.c_char * 128),
        ("isa", c.c_char * 32),
        ("threads", c.c_int32),
        ("sm", c.c_int32),
        ("sm_count", c.c_int32),
        ("l2_bytes", c.c_int32),
        ("memory_bytes", c.c_uint64),
        ("read_bytes_per_s", c.c_uint64),
    ]


class Pack(c.Structure):
    """ec_pack."""

    _fields_ = [
        ("src", c.c_void_p),
        ("dst", c.c_void_p),
        ("dst_bytes", c.c_uint64),
        ("src_type", c.c_int32),
        ("dst_type", c.c_int32),
        ("n", c.c_int32),
        ("k", c.c_int32),
    ]


_STATUS = c.c_int
_OP_FN = c.CFUNCTYPE(_STATUS, c.c_void_p, c.POINTER(Step), c.c_void_p)


class Api(c.Structure):
    """ec_api."""

    _fields_ = [
        ("abi", c.c_int32),
        ("reserved", c.c_int32),
        ("backend", c.c_char_p),
        ("isa", c.c_char_p),
        ("last_error", c.CFUNCTYPE(c.c_char_p)),
        ("query", c.CFUNCTYPE(_STATUS, c.POINTER(Device))),
        ("stream_create", c.CFUNCTYPE(_STATUS, c.c_int32, c.POINTER(c.c_void_p))),
        ("stream_destroy", c.CFUNCTYPE(None, c.c_void_p)),
        ("stream_threads", c.CFUNCTYPE(_STATUS, c.c_void_p, c.POINTER(c.c_int32))),
        ("op", _OP_FN * OP_COUNT),
        (
            "run",
            c.CFUNCTYPE(
                _STATUS, c.c_void_p, c.POINTER(Step), c.c_void_p, c.c_int32, c.POINTER(c.c_int32)
            ),
        ),
        (
            "workspace_size",
            c.CFUNCTYPE(_STATUS, c.POINTER(Step), c.c_void_p, c.c_int32, c.POINTER(c.c_size_t)),
        ),
        (
            "weight_bytes",
            c.CFUNCTYPE(_STATUS, c.c_int32, c.c_int32, c.c_int32, c.POINTER(c.c_uint64)),
        ),
        ("pack", c.CFUNCTYPE(_STATUS, c.c_void_p, c.POINTER(Pack))),
        ("unpack", c.CFUNCTYPE(_STATUS, c.POINTER(Weight), c.c_int32, c.c_void_p)),
    ]


_FIELD_TYPES: dict[Kind, Any] = {
    Kind.WEIGHT: Weight,
    Kind.NORM: NormArgs,
    Kind.INT: c.c_int32,
    Kind.FLOAT: c.c_float,
}


def _struct(op: Op) -> type[c.Structure]:
    def ctype(field: Field) -> Any:
        return _FIELD_TYPES.get(field.kind, c.c_void_p)

    fields = [(field.name, ctype(field)) for field in op.fields]
    return type(f"ec_{op.name}", (c.Structure,), {"_fields_": fields})


ARGS: dict[str, type[c.Structure]] = {name: _struct(op) for name, op in OPS.items()}


def address(array: NDArray[Any] | None) -> int | None:
    """Where an array's data start; None stays None. The caller keeps the array alive."""
    return None if array is None else int(array.ctypes.data)


class Library:
    """One backend's function table. Errors are the library's own sentences."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.isa: str = api.isa.decode()

    def check(self, status: int, what: str) -> None:
        """Turn a status into an error."""
        if status == 0:
            return
        message = f"{what}: {self._api.last_error().decode(errors='replace')}"
        raise (InvalidRequest if status == 1 else BackendError)(message)

    def query(self) -> Device:
        """Facts about the processor, with a short measurement of its read bandwidth."""
        device = Device()
        self.check(self._api.query(c.byref(device)), "query")
        return device

    def stream(self, threads: int | None = None) -> Stream:
        """A thread pool; None takes as many threads as the memory can feed."""
        return Stream(self, self._api, threads or 0)

    def run_op(self, code: int, stream: Stream | Borrowed, step: Step, args: c.Structure) -> None:
        """One op, for tests and tools."""
        self.check(self._api.op[code](stream.handle, c.byref(step), c.addressof(args)), "op")

    def op(self, code: int) -> Callable[[int, Any, int], int]:
        """One op as a bare function of a stream's handle, a step and its struct's address, for
        callers that may make nothing per call.
        """
        function: Callable[[int, Any, int], int] = self._api.op[code]
        return function

    def run(self, stream: Stream | Borrowed, step: Step, calls: c.Array[Call]) -> None:
        """A recorded forward pass, without the interpreter lock."""
        failed = c.c_int32(-1)
        status = self._api.run(
            stream.handle, c.byref(step), c.addressof(calls), len(calls), c.byref(failed)
        )
        self.check(status, f"call {failed.value} of {len(calls)}")

    def workspace_size(self, step: Step, calls: c.Array[Call]) -> int:
        """Bytes of scratch memory that the calls need for a step of this geometry."""
        size = c.c_size_t()
        status = self._api.workspace_size(
            c.byref(step), c.addressof(calls), len(calls), c.byref(size)
        )
        self.check(status, "workspace_size")
        return size.value

    def pack(
        self, stream: Stream, src: NDArray[Any], src_type: str, codec: Codec, dst: NDArray[Any]
    ) -> None:
        """Quantize rows [n, k] ("f32", "f16", or "bf16" as uint16) into blocks (uint8)."""
        if not (src.flags.c_contiguous and dst.flags.c_contiguous and src.ndim == 2):
            raise InvalidRequest("pack needs a contiguous [n, k] source and a contiguous target")
        n, k = src.shape
        args = Pack(
            address(src), address(dst), dst.nbytes, SOURCE_TYPES[src_type], codec.ec_type, n, k
        )
        self.check(self._api.pack(stream.handle, c.byref(args)), "pack")

    def unpack(self, weight: Weight, expert: int = 0) -> NDArray[np.float32]:
        """The float32 matrix that a weight stands for."""
        out = np.empty((weight.n, weight.k), np.float32)
        self.check(self._api.unpack(c.byref(weight), expert, address(out)), "unpack")
        return out


class Borrowed(NamedTuple):
    """A stream that somebody else made and will destroy."""

    handle: int


class Stream:
    """A thread pool of the CPU table, a CUDA stream of the other."""

    def __init__(self, library: Library, api: Api, threads: int) -> None:
        handle, count = c.c_void_p(), c.c_int32()
        library.check(api.stream_create(threads, c.byref(handle)), "stream_create")
        self.handle: int | None = handle.value
        self._destroy: Callable[[int], None] = api.stream_destroy
        library.check(api.stream_threads(handle, c.byref(count)), "stream_threads")
        self.threads = count.value

    def close(self) -> None:
        """Join the threads."""
        if self.handle is not None:
            self._destroy(self.handle)
            self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.close()


def library_path() -> Path:
    """The CPU kernel library in use."""
    return Path(os.environ.get("EDGECASCADE_LIBRARY", LIBRARY))


def cuda_library_path() -> Path:
    """The CUDA kernel library in use."""
    return Path(os.environ.get("EDGECASCADE_CUDA_LIBRARY", CUDA_LIBRARY))


@cache
def _load(path: Path, way_out: str) -> c.CDLL:
    if not path.exists():
        raise BackendUnavailable(f"the kernel library {path} is not built; {way_out}")
    try:
        return c.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"the kernel library {path} does not load: {error}") from error


@cache
def _load_cpu(path: Path) -> c.CDLL:
    library = _load(path, "run `make setup`, or `pip install .`")
    library.ec_cpu.argtypes, library.ec_cpu.restype = [c.c_char_p], c.POINTER(Api)
    library.ec_cpu_isas.argtypes, library.ec_cpu_isas.restype = [], c.c_char_p
    return library


def cpu_isas() -> list[str]:
    """Instruction sets this machine runs, slowest first."""
    names: bytes = _load_cpu(library_path()).ec_cpu_isas()
    return names.decode().split()


@cache
def cpu_library(isa: str | None = None) -> Library:
    """The CPU table for an instruction set, by default the fastest.

    Raises:
        InvalidRequest: when the machine lacks the set.
        BackendUnavailable: when the library is not built or is of another version.
    """
    pointer = _load_cpu(library_path()).ec_cpu(isa.encode() if isa else None)
    if not pointer:
        raise InvalidRequest(f"isa is {isa!r}; this machine has {', '.join(cpu_isas())}")
    return _checked(pointer.contents)


@cache
def cuda_library() -> Library:
    """The CUDA table of the device that is current.

    Raises:
        BackendUnavailable: when the library is not built, is of another version, or finds no
        device it has kernels for.
    """
    return open_cuda_library(cuda_library_path())


@cache
def open_cuda_library(path: Path) -> Library:
    """A CUDA table by its path; see cuda_library."""
    library = _load(path, "run `make setup` on a machine with the CUDA toolkit (nvcc)")
    library.ec_cuda.argtypes, library.ec_cuda.restype = [], c.POINTER(Api)
    pointer = library.ec_cuda()
    if not pointer:
        library.ec_cuda_problem.argtypes, library.ec_cuda_problem.restype = [], c.c_char_p
        problem: bytes = library.ec_cuda_problem()
        raise BackendUnavailable(
            f"the kernel library {path} cannot use this machine's GPU, or there is none: "
            f"{problem.decode()}; built here, it suits driver and GPU: `make setup`"
        )
    return _checked(pointer.contents)


def _checked(api: Api) -> Library:
    if api.abi != ABI_VERSION:
        raise BackendUnavailable(
            f"the kernel library has ABI {api.abi}, this package needs {ABI_VERSION}; "
            "reinstall both together"
        )
    return Library(api)
