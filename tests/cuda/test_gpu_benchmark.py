# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py without a GPU: on the emulator and the driver's stand-in it measures every part
of a tiny model, and its sums are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_benchmark_program import L2_BYTES
from kernels import ROOT, cuda_emulated

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_ops import PARTS
from gpu_report import Report, run_within

from edgecascade.errors import EdgeCascadeError

PLUGINS = ROOT / "plugins"
KINDS = ["embed", "in_proj", "mamba", "out_proj", "moe", "qkv", "attention", "o_proj", "head"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script wrote and said."""
    cuda_emulated()
    kernels = ROOT / "build" / "cuda-emulated" / "libedgecascade_cuda_emulated.so"
    folder = tmp_path_factory.mktemp("gpu")
    driver = ROOT / "tests" / "trt" / "fakecuda.c"
    _compile("CC", "cc", driver, folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    includes = [f"-I{PLUGINS / part}" for part in ("include", "common", "cuda")]
    emulator = [str(PLUGINS / "cuda/emulator/emulator.cpp"), str(PLUGINS / "common/checks.cpp")]
    options = ["-std=c++17", "-U_FORTIFY_SOURCE", "-DEC_EMULATED", *includes, *emulator, "-ldl"]
    read = ROOT / "benchmarks" / "stream_read.cu"
    _compile("CXX", "c++", read, folder / "stream_read.so", *options)
    program = ROOT / "tests" / "cuda" / "gpu_benchmark_program.py"
    arguments = [folder, kernels, folder / "stream_read.so", folder]
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    made["said"] = done.stdout.splitlines()
    assert made["failed"] == []
    return made


def _compile(variable: str, default: str, source: Path, target: Path, *options: str) -> None:
    language = "c" if source.suffix == ".c" else "c++"
    command = [os.environ.get(variable, default), "-O1", "-shared", "-fPIC", "-x", language]
    subprocess.run([*command, str(source), *options, "-o", str(target)], check=True)


def test_a_decoded_token_of_the_30b_is_164_launches(seen: dict[str, Any]) -> None:
    # 23 Mamba and 23 expert layers of 3, 6 attention layers of 4, embedding and head.
    assert seen["launches"] == 23 * 3 + 23 * 3 + 6 * 4 + 2 == 164


def test_the_ops_of_a_step_are_the_step(seen: dict[str, Any]) -> None:
    for step in seen["decode"]:
        ops = [op for op in seen["ops"] if op["op"] in KINDS and op["batch"] == step["batch"]]
        assert [op["op"] for op in ops] == KINDS
        assert sum(op["calls"] * op["launches"] for op in ops) == step["launches"]


def test_the_ops_of_a_prompt_are_its_launches(seen: dict[str, Any]) -> None:
    assert [op["op"] for op in seen["prompt_ops"] if not op["op"].startswith(" ")] == KINDS
    launches = {op["op"]: op["launches"] for op in seen["prompt_ops"]}
    assert launches["mamba"] == 4
    assert launches["moe"] == 10
    assert all(op["batch"] == 9 and op["us"] > 0 for op in seen["prompt_ops"])


def test_bytes_are_those_of_the_weights_that_a_call_reads(seen: dict[str, Any]) -> None:
    block = 1088  # 32 rows of 64 columns
    bytes_of = {op["op"]: op["bytes"] for op in seen["ops"] if op["batch"] == 1}
    assert bytes_of["head"] == 4 * block
    assert bytes_of["qkv"] == 4 * block
    assert bytes_of["  experts up"] == 2 * 2 * block  # 2 experts are taken
    for batch in (1, 2):
        moved = {op["op"]: op["bytes"] for op in seen["ops"] if op["batch"] == batch}
        assert moved["moe"] == sum(moved[f"  {part}"] for part in PARTS["moe"])


def test_weights_that_fit_into_the_l2_are_rotated(seen: dict[str, Any]) -> None:
    for op in seen["ops"]:
        if op["op"] in ("in_proj", "out_proj", "qkv", "o_proj", "head"):
            assert op["replayed_bytes"] >= 4 * L2_BYTES
            assert not op["in_l2"]


def test_every_figure_is_there(seen: dict[str, Any]) -> None:
    assert min(seen["ceiling"]["copy"], seen["ceiling"]["read"], seen["load"]["seconds"]) > 0
    ways = [(row["overlap"], row["prefetch"]) for row in seen["boundary"]]
    assert ways == [(False, False), (False, True), (True, False), (True, True)]
    assert min(min(row["us"], row["step_us"]) for row in seen["boundary"]) > 0
    assert [(row["batch"], row["context"]) for row in seen["decode"]] == [
        (1, 0), (1, 3), (2, 0), (2, 3),
    ]  # fmt: skip
    assert [(row["tokens"], row["piece"]) for row in seen["prefill"]] == [(9, 9), (9, 4)]
    assert [row["tokens"] for row in seen["first_token"]] == [9]
    assert [row["batch"] for row in seen["generate"]] == [1, 2]
    ops = len(seen["ops"]) + len(seen["prompt_ops"])
    assert len(seen["said"]) == 2 + 2 + 4 + ops + 4 + 2 + 1 + 1 + 2 + 1
    assert seen["gpu"]["cuda_driver"] == "12.6"
    assert {"commit", "date", "device", "version"} <= seen.keys()


def test_the_greedy_tokens_are_compared_with_the_cpus(seen: dict[str, Any]) -> None:
    compared = seen["cpu"]
    assert compared["rows"] == 3
    assert compared["wrong"] == 0
    assert compared["distance"] < 0.05  # tests/tolerances.py: 8-bit activations there, halves here


def test_a_part_that_fails_costs_no_other(tmp_path: Path) -> None:
    said: list[str] = []
    report = Report(said.append, tmp_path / "new" / "out.json")

    def work(item: int) -> list[int]:
        if item == 2:
            raise ZeroDivisionError
        return [item, item]

    assert report.take("first", lambda: {"us": 1}) == {"us": 1}
    assert report.rows("steps", (1, 2, 3), work) == [1, 1, 3, 3]
    assert json.loads(report.out.read_text()) == {
        "first": {"us": 1},
        "steps": [1, 1, 3, 3],
        "failed": said,
    }
    assert len(said) == 1
    assert said[0].startswith("steps 2: ZeroDivisionError() in test_gpu_benchmark.py:")


def test_a_measurement_that_hangs_ends_with_what_it_has(tmp_path: Path) -> None:
    program = (
        "import sys, threading; from pathlib import Path; from gpu_report import Report\n"
        "report = Report(print, Path(sys.argv[1])); report.take('one', lambda: 1)\n"
        "report.end_after(0.1); report.take('two', threading.Event().wait)"
    )
    out = tmp_path / "out.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    command = [sys.executable, "-c", program, str(out)]
    done = subprocess.run(command, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    seen = json.loads(out.read_text())
    assert seen["one"] == 1
    assert seen["failed"] == ["two: not done when the time was up, 0 s"]


def test_a_command_that_takes_too_long_is_ended_with_what_it_started() -> None:
    status, said = run_within(["sh", "-c", "echo out; echo err >&2; exit 3"], 60)
    assert (status, said) == (3, "out\nerr\n")
    with pytest.raises(EdgeCascadeError, match=r"sh was ended after 0 s; its last line: begun"):
        run_within(["sh", "-c", "echo begun; sleep 600 & wait"], 0.3)
