# SPDX-License-Identifier: Apache-2.0
"""What this machine offers, and what is missing: each finding in words that say what to do."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgecascade.backends._lib import ABI_VERSION, cpu_isas, cpu_library, library_path
from edgecascade.device.facts import facts
from edgecascade.device.memory import memory_bytes
from edgecascade.errors import EdgeCascadeError

GPU_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0")


def examine() -> dict[str, Any]:
    """All findings as JSON values."""
    return {
        "version": package_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes("MemTotal"),
        "available_bytes": memory_bytes("MemAvailable"),
        "library": _library(),
        "gpu": _gpu(),
        "tensorrt": _tensorrt(),
        "device": facts().description(),
    }


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("edgecascade")
    except PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The processor's own name, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _library() -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(library_path()), "abi": ABI_VERSION}
    try:
        library = cpu_library()
        stream = library.stream()
        try:
            found["threads"] = stream.threads
        finally:
            stream.close()
        found |= {
            "isas": cpu_isas(),
            "isa": library.isa,
            "read_bytes_per_s": library.query().read_bytes_per_s,
        }
    except EdgeCascadeError as error:
        found["problem"] = str(error)
    return found


def _gpu() -> str:
    nodes = [node for node in GPU_NODES if Path(node).exists()]
    if not nodes:
        return "no NVIDIA GPU; the CPU backend runs everything"
    return f"NVIDIA GPU at {nodes[0]}; this version runs on the CPU beside it"


def _tensorrt() -> str:
    if find_spec("tensorrt") is None:
        where = "the system's Python has it on a Jetson" if sys.prefix != sys.base_prefix else ""
        return "no TensorRT module" + (f"; {where}" if where else "")
    try:
        return f"TensorRT {version('tensorrt')}"
    except PackageNotFoundError:
        return "TensorRT of unknown version"
