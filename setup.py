# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel libraries with CMake and ships them as edgecascade/_lib/lib*.so.

The CPU's is always built. The one for CUDA is where nvcc is, for the GPUs of this machine, or for
those that EDGECASCADE_CUDA_ARCHS names ("87;110" is Orin and Thor); "none" leaves it out.

Everything else about the package is in pyproject.toml. The library has a plain C ABI and is loaded
with ctypes, so that one wheel serves every Python 3: its tag names the platform only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it lived in wheel
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARY = "libedgecascade_cpu.so"
GPU_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu")  # a desktop's, and Jetsons'


class KernelDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BuildKernels(build_ext):
    """Runs CMake in the place of a C extension; editable installs get the library in place."""

    def run(self) -> None:
        # An editable install's own build folder is gone afterwards: every rebuild would be full.
        work = ROOT / "build" / "kernels" if self.inplace else Path(self.build_temp).resolve()
        built = compile_kernels(work, debug=bool(self.debug))
        base = ROOT if self.inplace else Path(self.build_lib).resolve()
        folder = (base / self.get_ext_filename("")).parent
        folder.mkdir(parents=True, exist_ok=True)
        for library in built:
            # Replace, not overwrite: a process that has the old library mapped keeps it whole.
            part = folder / f"{library.name}.part"
            shutil.copy2(library, part)
            os.replace(part, folder / library.name)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join("edgecascade", "_lib", LIBRARY)


def cuda_options() -> list[str]:
    """CMake's options for the CUDA library; none where it is not built, which is said."""
    wanted = os.environ.get("EDGECASCADE_CUDA_ARCHS", "")
    if wanted == "none":
        return []
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        if wanted:
            raise SetupError(f"EDGECASCADE_CUDA_ARCHS is {wanted!r}, but nvcc is not on PATH")
        print("no nvcc: built without CUDA")
        return []
    if not wanted and not any(map(os.path.exists, GPU_NODES)):
        print("nvcc, but no GPU: built without CUDA; EDGECASCADE_CUDA_ARCHS=87 builds it for Orin")
        return []
    archs = "native"
    if wanted:
        names = wanted.replace(",", ";").replace(" ", ";").split(";")
        archs = ";".join(f"{name}-real" for name in names if name)
    return [f"-DEC_CUDA_ARCHS={archs}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


def compile_kernels(work: Path, *, debug: bool) -> list[Path]:
    cmake, ninja = find_tool("cmake"), shutil.which("ninja")
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("c++") is None:
        raise SetupError("no C++ compiler: apt-get install g++, or name yours in CXX")
    configure = [
        cmake,
        f"-S{ROOT / 'plugins'}",
        f"-B{work}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work / 'lib'}",
    ]
    if ninja:
        # Named on every run: with build isolation the path of the last one no longer exists.
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    cuda = cuda_options()
    configure += cuda or ["-DEC_CUDA_ARCHS="]
    targets = ["edgecascade_cpu", *(["edgecascade_cuda"] if cuda else [])]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
    subprocess.run(configure, check=True)
    subprocess.run(
        [cmake, "--build", str(work), "--target", *targets, "--parallel", jobs], check=True
    )
    return [work / "lib" / f"lib{target}.so" for target in targets]


def find_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SetupError(f"{name} is not on PATH: pip install {name}")
    return path


setup(
    distclass=KernelDistribution,
    ext_modules=[Extension("edgecascade._lib.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
