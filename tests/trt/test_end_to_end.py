# SPDX-License-Identifier: Apache-2.0
"""An engine answers as the CPU backend does, and a captured decode step runs no Python.

TensorRT is played by tests/trt/driver.py on NVIDIA's bindings, device memory by the host's, kernels
by the CPU's: all of the project's own code for a Jetson runs here, and none of NVIDIA's library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import standin
from kernels import cuda_emulated
from tolerances import CUDA_LOGITS

from build_engine.pipeline import build


def layers(pattern: str, folder: Path) -> Path:
    """A bundle of these layers: an engine has no tensor that none of them reads."""
    config = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    arrays = checkpoints.arrays(**config)
    checkpoint = checkpoints.write(folder / f"checkpoint-{pattern}", arrays, **config)
    build(checkpoint, folder / f"bundle-{pattern}", precision="speed", verify=False)
    return folder / f"bundle-{pattern}"


@pytest.mark.parametrize("release", ["10.3", "11.4"])
def test_200_answers_are_the_cpu_backends_and_decode_is_one_launch(
    prepared: standin.Prepared,
    own_bundle: Callable[[str, str], Path],
    tmp_path: Path,
    release: str,
) -> None:
    program = [sys.executable, str(standin.HERE / "end_to_end.py"), release]
    shapes = (("odd", "exact"), ("dense", "quality"), ("groups", "balanced"))
    more = [
        *(own_bundle(*each) for each in shapes),
        layers("MEM", tmp_path),
        layers("E-", tmp_path),
    ]
    arguments = [str(path) for path in (prepared(release), own_bundle("tiny", "speed"), *more)]
    done = subprocess.run(
        [*program, *arguments], cwd=standin.ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["prompts"], seen["differ"]) == (200, [])
    assert seen["tokens"] > 1000
    assert seen["captured"] == [1, 2, 3, 4, 5, 6, 7, 8]  # sequences in a step
    assert seen["contexts"] == 9
    # Tokens go up, logits come down, one wait for them, one launch: no plugin is called.
    replay = {"enqueued": 0, "allocations": 0, "waits": 1, "copies": 1, "calls": 0, "launches": 1}
    assert seen["replay"] == replay
    assert seen["steps"] == {path.name: [] for path in more}
    assert seen["current"] == [True, False]
    report = seen["doctor"]
    assert (report["status"], report["error"], report["stage"]) == (0, None, "done")
    assert report["decode"]["distance"] == 0
    assert report["decode"]["captured"] == [1, 8]
    assert report["tokens"]["same"] == report["tokens"]["steps"] > 0
    assert seen["refused"] == {"same": True, "captured": 0}
    assert "decode is not captured as a CUDA graph" in done.stderr


def test_the_cuda_kernels_behind_the_plugins_give_the_references_logits(
    prepared: standin.Prepared, own_bundle: Callable[[str, str], Path]
) -> None:
    """Their own source, compiled for the CPU: what a plugin hands over is what they expect."""
    cuda_emulated()
    library = standin.ROOT / "build" / "cuda-emulated" / "libedgecascade_cuda_emulated.so"
    program = [sys.executable, str(standin.HERE / "emulated.py"), "10.3"]
    arguments = [str(path) for path in (prepared("10.3"), own_bundle("moe", "speed"), library)]
    done = subprocess.run(
        [*program, *arguments], cwd=standin.ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == 7
    assert {step: far for step, far in seen.items() if not far <= CUDA_LOGITS} == {}
