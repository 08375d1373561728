# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend with its real kernels, emulated, and graphs captured by a stand-in driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
from golden import Build
from kernels import CUDA_EMULATED, cuda_emulated

from edgecascade.backends.base import open_backend
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the driver's stand-in."""
    folder = tmp_path_factory.mktemp("driver")
    source = HERE.parent / "trt" / "fakecuda.c"
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


@pytest.mark.parametrize("precision", ["exact", "speed"])
def test_it_computes_what_the_cpu_does(driver: Path, build: Build, precision: str) -> None:
    cuda_emulated()  # builds it
    program = [sys.executable, str(HERE / "backend_program.py")]
    paths = [str(driver), str(CUDA_EMULATED), str(build("tiny", precision))]
    done = subprocess.run([*program, *paths], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    bound = tolerances.CUDA_EXACT if precision == "exact" else tolerances.INT8_ACTIVATIONS
    for what in ("logits", "prefill", "decode", "moved"):
        assert seen[what] <= bound, seen
    assert seen["margin_flips"] == 0
    assert seen["again"], "a prompt gives the same bits again"
    assert seen["captured"] == [[1, 512], [2, 512], [3, 512]]


def test_without_a_driver_or_the_library_it_says_so(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle, pytest.raises(BackendUnavailable) as caught:
        open_backend("cuda", bundle)
    assert "NVIDIA" in str(caught.value) or "make setup" in str(caught.value)
