# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver: a context, memory, streams and graphs of one device, and nothing else.

Where pycuda is installed it owns context, memory and streams. It has neither graphs nor streams of
others, so these are calls of libcuda through ctypes, and without pycuda so is the rest.
"""

from __future__ import annotations

import atexit
import ctypes as c
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.device.memory import memory_bytes
from edgecascade.errors import BackendError, BackendUnavailable, OutOfMemory

log = logging.getLogger(__name__)

OUT_OF_MEMORY = 2
THREAD_LOCAL_CAPTURE = 1  # other threads may go on allocating
NON_BLOCKING = 1
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
INTEGRATED = 18  # CU_DEVICE_ATTRIBUTE_INTEGRATED

_P, _SIZE, _ADDRESS, _INT, _UINT = c.c_void_p, c.c_size_t, c.c_uint64, c.c_int, c.c_uint
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDeviceGetCount": (_P,),
    "cuDeviceGet": (_P, _INT),
    "cuDeviceGetName": (_P, _INT, _INT),
    "cuDeviceGetAttribute": (_P, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_P, _INT),
    "cuCtxSetCurrent": (_P,),
    "cuMemGetInfo_v2": (_P, _P),
    "cuMemAlloc_v2": (_P, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_P, _SIZE, _UINT),
    "cuMemFreeHost": (_P,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _P, _SIZE, _P),
    "cuMemcpyDtoHAsync_v2": (_P, _ADDRESS, _SIZE, _P),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _P),
    "cuMemsetD8Async": (_ADDRESS, c.c_ubyte, _SIZE, _P),
    "cuStreamCreate": (_P, _UINT),
    "cuStreamDestroy_v2": (_P,),
    "cuStreamSynchronize": (_P,),
    "cuStreamBeginCapture_v2": (_P, _INT),
    "cuStreamEndCapture": (_P, _P),
    "cuGraphGetNodes": (_P, _P, _P),
    "cuGraphInstantiateWithFlags": (_P, _P, c.c_ulonglong),
    "cuGraphLaunch": (_P, _P),
    "cuGraphDestroy": (_P,),
    "cuGraphExecDestroy": (_P,),
}


@cache
def _library() -> c.CDLL:
    try:
        library = c.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c.c_int
    library.cuGetErrorName.argtypes = [c.c_int, c.POINTER(c.c_char_p)]
    return library


def _error_name(status: int) -> str:
    text = c.c_char_p()
    _library().cuGetErrorName(status, c.byref(text))
    return f"{(text.value or b'an error').decode()} ({status})"


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise BackendError(f"{name}: {_error_name(status)}")


class Graph:
    """Captured work of a stream, replayed with one call; `nodes` counts its launches and copies."""

    def __init__(self, handle: int) -> None:
        self._run, nodes = c.c_void_p(), c.c_size_t()
        _call("cuGraphGetNodes", handle, None, c.byref(nodes))
        self.nodes = nodes.value
        _call("cuGraphInstantiateWithFlags", c.byref(self._run), handle, 0)
        _call("cuGraphDestroy", handle)

    def launch(self, stream: int) -> None:
        """Start the work."""
        _call("cuGraphLaunch", self._run, stream)

    def close(self) -> None:
        """Free it."""
        if self._run:
            _call("cuGraphExecDestroy", self._run)
            self._run = c.c_void_p()


class Device:
    """The first device and its primary context, which TensorRT uses too."""

    def __init__(self) -> None:
        count, device = c.c_int(), c.c_int()
        try:
            _call("cuInit", 0)
            _call("cuDeviceGetCount", c.byref(count))
        except BackendError as error:
            raise BackendUnavailable(f"the NVIDIA driver finds no GPU: {error}") from error
        if not count.value:
            raise BackendUnavailable("the NVIDIA driver finds no GPU")
        _call("cuDeviceGet", c.byref(device), 0)
        self._device = device.value
        self._owned: list[Callable[[], None]] = []  # what close() does, the last first
        self._streams: list[Any] = []
        self._context = self._retain()
        self.use()

    def _retain(self) -> int:
        context = c.c_void_p()
        _call("cuDevicePrimaryCtxRetain", c.byref(context), self._device)
        return int(context.value or 0)

    def use(self) -> None:
        """Make the context current on the calling thread."""
        _call("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        """The GPU's own name."""
        text = c.create_string_buffer(128)
        _call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def sm(self) -> int:
        """Compute capability, 87 for 8.7."""
        major, minor = (self._attribute(number) for number in COMPUTE_CAPABILITY)
        return 10 * major + minor

    def _attribute(self, number: int) -> int:
        value = c.c_int()
        _call("cuDeviceGetAttribute", c.byref(value), number, self._device)
        return value.value

    @property
    def available_bytes(self) -> int:
        """Device memory that can be had. Where it is the system's, as on a Jetson, the driver
        takes the page cache for used, which reading a bundle fills; the system gives it back.
        """
        available, total = c.c_size_t(), c.c_size_t()
        _call("cuMemGetInfo_v2", c.byref(available), c.byref(total))
        shared = memory_bytes() if self._attribute(INTEGRATED) else None
        return available.value if shared is None else shared

    def alloc(self, size: int) -> int:
        """The address of `size` bytes of device memory.

        Raises:
            OutOfMemory: when there are none.
        """
        address = c.c_uint64()
        status = _library().cuMemAlloc_v2(c.byref(address), max(size, 1))
        if status == OUT_OF_MEMORY:
            raise OutOfMemory(_lacking(size, self.available_bytes))
        if status:
            raise BackendError(f"cuMemAlloc of {size} bytes: {_error_name(status)}")
        self._owned.append(lambda: _call("cuMemFree_v2", address))
        return address.value

    def host(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A page-locked array of zeros, which copies need not stage."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = c.c_void_p()
        _call("cuMemHostAlloc", c.byref(address), max(size, 1), 0)
        raw = (c.c_char * size).from_address(address.value or 0)
        array = np.frombuffer(raw, dtype).reshape(shape)
        array[...] = 0
        self._owned.append(lambda: _call("cuMemFreeHost", address))
        return array

    def stream(self) -> int:
        """A new stream, which does not wait for the default one."""
        handle = c.c_void_p()
        _call("cuStreamCreate", c.byref(handle), NON_BLOCKING)
        self._owned.append(lambda: _call("cuStreamDestroy_v2", handle))
        return int(handle.value or 0)

    def close(self) -> None:
        """Free all memory and streams of this object; arrays from host() are dead. Of a context
        that a fault has spoilt nothing can be freed: its memory goes with the process.
        """
        try:
            self.use()
            while self._owned:
                self._owned.pop()()
        except BackendError as error:
            log.warning("GPU memory stays taken until this process ends: %s", error)
            self._owned.clear()

    def synchronize(self, stream: int) -> None:
        """Wait for everything that was started on a stream."""
        _call("cuStreamSynchronize", stream)

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device; page-locked ones must stay as they are until
        the stream is through.
        """
        _call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy to a contiguous array; it is complete once the stream is through."""
        _call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy within the device."""
        _call("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        """Fill with zeros."""
        _call("cuMemsetD8Async", address, 0, size, stream)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        """Record what `work` starts on the stream, without doing it.

        Raises:
            BackendError: when the work did what cannot be captured.
        """
        with self._capturing(stream) as graph:
            work()
        return Graph(int(graph.value or 0))

    @contextmanager
    def _capturing(self, stream: int) -> Iterator[c.c_void_p]:
        graph = c.c_void_p()
        _call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL_CAPTURE)
        try:
            yield graph
        except BaseException:
            # The stream must leave capture mode; what the work raised says more than the driver.
            _library().cuStreamEndCapture(stream, c.byref(graph))
            raise
        _call("cuStreamEndCapture", stream, c.byref(graph))


@cache
def _pycuda(device: int) -> tuple[Any, Any]:
    """pycuda's driver module and primary context, which stays until the process ends: pycuda
    would take it away from everybody else together with its object.
    """
    import pycuda.driver as cuda  # type: ignore[import-not-found, import-untyped, unused-ignore]

    cuda.init()
    primary = cuda.Device(device).retain_primary_context()
    atexit.register(primary.detach)
    return cuda, primary


class PycudaDevice(Device):
    """The same, with context, memory and streams of pycuda."""

    def _retain(self) -> int:
        self._cuda, self._primary = _pycuda(self._device)
        return int(self._primary.handle)

    @contextmanager
    def _active(self) -> Iterator[Any]:
        """pycuda knows only contexts on its own stack, and aborts if one is left there."""
        self._primary.push()
        try:
            yield self._cuda
        except self._cuda.Error as error:
            raise BackendError(f"pycuda: {error}") from error
        finally:
            self._cuda.Context.pop()
            self.use()

    def alloc(self, size: int) -> int:
        """See Device."""
        with self._active() as cuda:
            try:
                memory = cuda.mem_alloc(max(size, 1))
            except cuda.MemoryError:
                raise OutOfMemory(_lacking(size, self.available_bytes)) from None
        self._owned.append(lambda: self._release(memory.free))
        return int(memory)

    def host(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """See Device."""
        with self._active() as cuda:
            array: NDArray[Any] = cuda.pagelocked_zeros(shape, dtype)
        self._owned.append(lambda: self._release(array.base.free))  # type: ignore[union-attr]
        return array

    def stream(self) -> int:
        """See Device."""
        with self._active() as cuda:
            stream = cuda.Stream(NON_BLOCKING)
        self._streams.append(stream)
        return int(stream.handle)

    def close(self) -> None:
        """See Device."""
        super().close()
        with self._active():
            self._streams.clear()

    def _release(self, free: Callable[[], None]) -> None:
        with self._active():
            free()


def open_device() -> Device:
    """The first device, through pycuda where that is installed.

    Raises:
        BackendUnavailable: when there is no driver or no GPU.
    """
    device = Device()
    try:
        return PycudaDevice()
    except ImportError as error:
        log.debug("no pycuda (%s); the driver's functions are called directly", error)
        return device


def _lacking(size: int, available: int) -> str:
    return f"{size / 1e9:.2f} GB of device memory cannot be had; {available / 1e9:.2f} GB are free"
