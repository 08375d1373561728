# SPDX-License-Identifier: Apache-2.0
"""Every question about TensorRT's version, 10.3 (JetPack 6.2) to 11.x, has its answer here.

What differs between the releases and touches us:

10.3        a Python plugin that is garbage-collected is freed twice (mended in 10.4), and the
            fields that it serializes are read after Python freed them (mended in 10.6).
11          EXPLICIT_BATCH is gone and STRONGLY_TYPED has another value; weak typing is gone.
"""

from __future__ import annotations

import ctypes
import re
from types import ModuleType
from typing import Any

from edgecascade.errors import BackendUnavailable

OLDEST = (10, 3)
NEWEST_MAJOR = 11


def import_tensorrt() -> ModuleType:
    """The `tensorrt` module.

    Raises:
        BackendUnavailable: when there is none, it does not load, or is of an unknown release.
    """
    try:
        import tensorrt  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BackendUnavailable(
            f"Python's TensorRT does not load ({error}); on a Jetson: sudo apt-get install "
            "python3-libnvinfer, and a virtual environment with --system-site-packages"
        ) from error
    found: ModuleType = tensorrt
    check_release(found)
    return found


def release(trt: ModuleType) -> tuple[int, int]:
    """Major and minor version."""
    version = getattr(trt, "__version__", None)  # a folder called tensorrt imports too
    match = re.match(r"(\d+)\.(\d+)", str(version))
    if match is None:
        raise BackendUnavailable(f"the module tensorrt is not NVIDIA's: version {version}")
    return int(match[1]), int(match[2])


def check_release(trt: ModuleType) -> None:
    """Refuse a release that the plugins were never tried on.

    Raises:
        BackendUnavailable: naming both sides.
    """
    if not OLDEST <= release(trt) < (NEWEST_MAJOR + 1, 0):
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} is installed; {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST_MAJOR}.x are supported"
        )


def keep_alive(plugin: Any) -> None:
    """Make a plugin object live for ever, as 10.3 needs; later releases leak a reference with
    each get_capability_interface() anyway, so it costs nothing there.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(plugin))


def network_flags(trt: ModuleType) -> int:
    """Flags of a strongly typed network, whose value moved in 11."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def deserialize(trt: ModuleType, logger: Any, plan: bytes) -> Any:
    """The engine of a plan; the plugins' creators must be registered before.

    Raises:
        BackendUnavailable: when TensorRT refuses it.
    """
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} refuses the engine's plan: {logger.last}"
        )
    return engine


def create_context(trt: ModuleType, engine: Any) -> Any:
    """A context without activation memory: the caller gives it some."""
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def make_logger(trt: ModuleType, log: Any) -> Any:
    """TensorRT's messages, passed to a logger of Python; `last` is the latest error."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: log.error,
        severity.ERROR: log.error,
        severity.WARNING: log.warning,
        severity.INFO: log.debug,
        severity.VERBOSE: log.debug,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it says no more"

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.last = message
            levels[level]("TensorRT: %s", message)

    return Logger()
