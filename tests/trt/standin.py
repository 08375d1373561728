# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own Python bindings of TensorRT over C stand-ins, so that they import anywhere.

Each release goes into a process of its own: `python tests/trt/<program>.py RELEASE FOLDER ...`.
Loading a library whose soname the bindings ask for is enough for the linker to take that one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Package and version; JetPack 6.2, 7.0/7.1, 7.2, and the release after them.
BINDINGS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.13": "tensorrt-cu13-bindings==10.13.3.9",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
Prepared = Callable[[str], Path]  # a release -> the folder with all that it needs
STUBS = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def download(release: str, folder: Path) -> Path:
    """The unpacked wheel of a release: a few megabytes from PyPI, once."""
    to = folder / f"bindings-{release}"
    if not to.exists():
        part = folder / f".part-{release}-{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        wheel = ["--no-deps", "--only-binary", ":all:", "--dest", str(part), BINDINGS[release]]
        subprocess.run([*pip, *wheel], check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(part.glob("*.whl"))) as packed:
            packed.extractall(part / "site")
        (part / "site").rename(to)
    return to


def compile_stand_ins(folder: Path) -> None:
    """The stand-ins for NVIDIA's libraries, into a folder."""
    for major in (10, 11):
        for name in STUBS:
            soname = f"lib{name}.so.{major}"
            _compile(HERE / "stub.c", folder / soname, f"-Wl,-soname,{soname}")
    _compile(HERE / "fakecuda.c", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    include = f"-I{ROOT / 'plugins' / 'include'}"
    _compile(HERE / "fakekernels.c", folder / "libedgecascade_cuda.so", include, "-ldl")


def _compile(source: Path, target: Path, *options: str) -> None:
    """In place at once: another worker of this run may be about to load it."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-Wall", str(source)]
    subprocess.run([*command, *options, "-o", str(part)], check=True)
    part.replace(target)


def load_rest_for_pycuda(folder: Path) -> None:
    """pycuda asks for some 100 functions of the driver; those that it never calls here exist."""
    import pycuda  # type: ignore[import-not-found, import-untyped]

    (module,) = Path(pycuda.__file__).parent.glob("_driver*.so")
    asked, given = (
        subprocess.run(["nm", "-D", kind, str(path)], check=True, capture_output=True, text=True)
        for kind, path in (
            ("--undefined-only", module),
            ("--defined-only", folder / "libcuda.so.1"),
        )
    )
    names = {line.split()[-1] for line in asked.stdout.splitlines()}
    names -= {line.split()[-1] for line in given.stdout.splitlines()}
    source = folder / "rest.c"
    source.write_text("".join(f"int {n}(void) {{ return 801; }}\n" for n in names if n[:2] == "cu"))
    _compile(source, folder / "librest.so")
    ctypes.CDLL(str(folder / "librest.so"), mode=ctypes.RTLD_GLOBAL)


def load(release: str, folder: Path) -> ModuleType:
    """The bindings as the module `tensorrt`, with device memory played by the host's."""
    from edgecascade.backends._lib import library_path

    os.environ["EDGECASCADE_LIBRARY"] = str(library_path())  # fakekernels.c looks there
    os.environ["EDGECASCADE_CUDA_LIBRARY"] = str(folder / "libedgecascade_cuda.so")
    major = release.partition(".")[0]
    for name in (*(f"lib{stub}.so.{major}" for stub in STUBS), "libcuda.so.1"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder / f"bindings-{release}"))
    import tensorrt_bindings as trt  # type: ignore[import-not-found]

    sys.modules["tensorrt"] = trt
    module: ModuleType = trt
    return module
