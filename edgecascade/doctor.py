# SPDX-License-Identifier: Apache-2.0
"""What this machine offers, and what is missing: each finding in words that say what to do."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgecascade.backends._lib import (
    ABI_VERSION,
    cpu_isas,
    cpu_library,
    cuda_library_path,
    library_path,
)
from edgecascade.backends._trt_versions import import_tensorrt
from edgecascade.device.facts import facts
from edgecascade.device.memory import memory_bytes
from edgecascade.errors import BackendUnavailable, EdgeCascadeError
from edgecascade.version import package_version

# By the part number in /proc/cpuinfo, which on aarch64 has no name, or "ARMv8 Processor" for all.
ARM = "0x41"
ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd42": "Cortex-A78AE",  # Orin
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
    "0xd83": "Neoverse V3AE",  # Thor
}
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


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, as far as Linux tells."""
    said: dict[str, str] = {}
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            said.setdefault(key.strip(), value.strip())  # of the first core
    if said.get("CPU implementer") == ARM and (core := ARM_CORES.get(said.get("CPU part", ""))):
        return core
    return said.get("model name") or platform.processor() or platform.machine()


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
    if not cuda_library_path().exists():
        return (
            f"NVIDIA GPU at {nodes[0]}; the CUDA kernels are not built, so the CPU runs beside it"
        )
    return f"NVIDIA GPU at {nodes[0]}, CUDA kernels at {cuda_library_path()}"


def _tensorrt() -> str:
    try:
        return f"TensorRT {import_tensorrt().__version__}"
    except BackendUnavailable as error:
        return str(error)
