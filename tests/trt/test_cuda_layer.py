# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver through ctypes and through pycuda: the same, and every refusal an error of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import standin

CAPTURE = "BackendError: cu{}: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)"


@pytest.mark.parametrize(("layer", "name"), [("ctypes", "Device"), ("pycuda", "PycudaDevice")])
def test_the_device_layer_does_what_it_is_asked(
    stand_ins: standin.Path, layer: str, name: str
) -> None:
    if layer == "pycuda" and find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed: it compiles against CUDA's own headers")
    program = [sys.executable, str(standin.HERE / "cuda_layer.py"), str(stand_ins), layer]
    done = subprocess.run(program, cwd=standin.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["layer"], seen["name"], seen["sm"]) == (name, "host memory", 87)
    steps = ("zeroed", "copied", "capture_does_nothing", "launch_does_it", "freed")
    assert [step for step in steps if not seen[step]] == []
    assert seen["waits"] == CAPTURE.format("StreamSynchronize")
    assert seen["allocates"].startswith("BackendError")
    assert seen["again"] == "nothing", "a refused capture leaves the stream usable"
    assert seen["too_much"].startswith("OutOfMemory: 35184.37 GB of device memory cannot be had")
    assert "CONTEXT" in seen["thread"][0], "a thread starts without a context"
    assert seen["thread"][1:] == ["nothing", "nothing"], "and has one after use()"
    assert seen["shared"] == 1234, "what the page cache holds of the system's memory can be had"
