# SPDX-License-Identifier: Apache-2.0
"""What is called of CUDA's driver is what its own header declares: names, arguments, numbers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_ops

from edgecascade.backends import _cuda

INCLUDES = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
UNBOUND = {  # called with arguments that carry their types
    "cuDriverGetVersion": "p8",
    "cuGetErrorName": "i4 p8",
    "cuGraphAddDependencies_v2": "p8 p8 p8 p8 u8",
    "cuGraphDestroyNode": "p8",
    "cuGraphNodeGetDependencies_v2": "p8 p8 p8 p8",
}
NUMBERS = {
    "CUDA_ERROR_OUT_OF_MEMORY": _cuda.OUT_OF_MEMORY,
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": _cuda.THREAD_LOCAL_CAPTURE,
    "CU_STREAM_NON_BLOCKING": _cuda.NON_BLOCKING,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": _cuda.COMPUTE_CAPABILITY[0],
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": _cuda.COMPUTE_CAPABILITY[1],
    "CU_DEVICE_ATTRIBUTE_INTEGRATED": _cuda.INTEGRATED,
    "CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC": gpu_ops.PROGRAMMATIC.from_port,
    "CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC": gpu_ops.PROGRAMMATIC.type,
    "sizeof(CUgraphEdgeData)": ctypes.sizeof(gpu_ops.EdgeData),
    **{
        f"offsetof(CUgraphEdgeData, {name})": getattr(gpu_ops.EdgeData, name).offset
        for name in ("from_port", "to_port", "type", "reserved")
    },
}
PROGRAM = """
#include <cstddef>
#include <cstdio>
#include <type_traits>
#include <cuda.h>

template <class T>
void argument() {{
  const bool is_signed = std::is_enum<T>::value || std::is_signed<T>::value;
  std::printf(" %c%zu", std::is_pointer<T>::value ? 'p' : is_signed ? 'i' : 'u', sizeof(T));
}}
template <class Function>
struct Declared;
template <class... Arguments>
struct Declared<CUresult(Arguments...)> {{
  static void print(const char* name) {{
    std::printf("%s", name);
    const int each[] = {{(argument<Arguments>(), 0)...}};
    std::printf("%s", each[0] ? "" : "\\n");
  }}
}};

int main() {{
{functions}
{numbers}
}}
"""


def kind(argument: type[ctypes._SimpleCData[int]]) -> str:
    """As PROGRAM prints it."""
    letter = "p" if argument is ctypes.c_void_p else "u"
    if letter == "u" and argument(-1).value < 0:
        letter = "i"
    return f"{letter}{ctypes.sizeof(argument)}"


def test_the_driver_is_called_as_its_header_says(tmp_path: Path) -> None:
    if not (INCLUDES / "cuda.h").exists():
        pytest.skip(f"{INCLUDES} has no cuda.h; CUDA_HOME names another place")
    bound = {name: " ".join(map(kind, types)) for name, types in _cuda._SIGNATURES.items()}
    called = bound | UNBOUND
    program = PROGRAM.format(
        functions="\n".join(f'  Declared<decltype({n})>::print("{n}");' for n in called),
        numbers="\n".join(f'  std::printf("{n} %d\\n", int({n}));' for n in NUMBERS),
    )
    (tmp_path / "declared.cpp").write_text(program)
    command = ["c++", "-std=c++17", f"-I{INCLUDES}", "declared.cpp", "-o", "declared"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "declared"], capture_output=True, text=True, check=True)
    want = [f"{name} {value}" for name, value in (called | NUMBERS).items()]
    assert said.stdout.splitlines() == want
