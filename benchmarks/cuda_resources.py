# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for each GPU and prints what it takes of one.

    python benchmarks/cuda_resources.py [--arch 87 --arch 90 --arch 110] [--json FILE]

Registers and spilled bytes a thread, static shared memory a block. A spill in a kernel that a
decoded token goes through ends it with status 1: there it is memory traffic for every token. Needs
nvcc: the toolkit's, or from PyPI: pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
nvidia-cuda-runtime nvidia-cuda-cccl, all of version 13.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
ARCHS = ("87", "90", "110")
# A decoded token goes through these; the others belong to prompts, and to float weights.
DECODE = (
    "embedRows",
    "fewRows",
    "first",
    "up",
    "down",
    "scan",
    "attendSplits",
    "joinSplits",
    "readLogits",
    "orderTokens",
    "chooseTokens",
)


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes, static

    @property
    def decodes(self) -> bool:
        return self.name.partition("<")[0] in DECODE


def find_nvcc() -> str | None:
    """The toolkit's nvcc, or that of the wheels on PyPI."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    wheels = (Path(folder, "nvidia", "cu13", "bin", "nvcc") for folder in folders)
    return shutil.which("nvcc") or next((str(path) for path in wheels if path.exists()), None)


def compile_one(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{PLUGINS / part}" for part in ("include", "common", "cuda")]
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", *includes, "--resource-usage"]
        command += ["-cubin", "-o", str(Path(folder, "out.cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return list(read(done.stderr + done.stdout, source.name, arch))


def read(log: str, source: str, arch: str) -> Iterator[Kernel]:
    entry = re.compile(
        r"Compiling entry function '(\S+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    for mangled, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        name = demangle(mangled)
        spilled = int(stores) + int(loads)
        yield Kernel(source, name, arch, int(registers), spilled, int(shared[1]) if shared else 0)


def demangle(mangled: str) -> str:
    """A kernel's own name and what it is an instance of, without namespaces and arguments."""
    tool = shutil.which("c++filt") or "c++filt"
    full = subprocess.run(
        [tool, mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    full = re.sub(
        r"\(anonymous namespace\)|ec::cuda::|_GLOBAL__N__\w+::|::_NV_ANON_NAMESPACE", "", full
    )
    head = full.partition("(")[0].removeprefix("void ").replace("::", "")
    return re.sub(r"\s+", " ", head)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="compute capability x 10; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is not found; " + __doc__.partition("nvcc: ")[2].strip(), file=sys.stderr)
        return 2
    archs = args.arch or list(ARCHS)
    sources = sorted((PLUGINS / "cuda").glob("*.cu"))
    jobs = [(source, arch) for arch in archs for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [
            kernel
            for part in pool.map(lambda job: compile_one(nvcc, *job), jobs)
            for kernel in part
        ]
    print(f"{'kernel':58} {'SM':>4} {'registers':>9} {'spilled B':>9} {'shared B':>8}")
    for kernel in made:
        mark = "  decode" if kernel.decodes else ""
        print(
            f"{kernel.name[:58]:58} {kernel.arch:>4} {kernel.registers:9} {kernel.spilled:9} "
            f"{kernel.shared:8}{mark}"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(kernel) for kernel in made], indent=1) + "\n")
    spilling = [kernel for kernel in made if kernel.decodes and kernel.spilled]
    for kernel in spilling:
        print(f"{kernel.name} spills {kernel.spilled} bytes on sm_{kernel.arch}", file=sys.stderr)
    print(f"{len(made)} kernels for {len(archs)} GPUs, {len(spilling)} decode spills")
    return 1 if spilling or not made else 0


if __name__ == "__main__":
    sys.exit(main())
