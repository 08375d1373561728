# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py without a GPU: on the emulator and the driver's stand-in it measures every part
of a tiny model, and its sums are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_benchmark_program import L2_BYTES
from kernels import CUDA_EMULATED, ROOT, cuda_emulated

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
from gpu_ops import PARTS
from gpu_report import Report, run_within

from edgecascade.backends._lib import OVERLAP, PREFETCH
from edgecascade.errors import EdgeCascadeError

PLUGINS = ROOT / "plugins"
KINDS = ["embed", "in_proj", "mamba", "out_proj", "moe", "qkv", "attention", "o_proj", "head"]


Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """program(folder, *arguments, **environment): the script on the stand-ins."""
    cuda_emulated()
    made = tmp_path_factory.mktemp("stand-ins")
    driver = ROOT / "tests" / "trt" / "fakecuda.c"
    _compile("CC", "cc", driver, made / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    includes = [f"-I{PLUGINS / part}" for part in ("include", "common", "cuda")]
    sources = [*(PLUGINS / "cuda/emulator").glob("*.cpp"), PLUGINS / "common/checks.cpp"]
    emulator = sorted(map(str, sources))
    options = ["-std=c++17", "-U_FORTIFY_SOURCE", "-DEC_EMULATED", *includes, *emulator, "-ldl"]
    read = ROOT / "benchmarks" / "stream_read.cu"
    _compile("CXX", "c++", read, made / "stream_read.so", *options)
    script = ROOT / "tests" / "cuda" / "gpu_benchmark_program.py"

    def run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        places = [made, CUDA_EMULATED, made / "stream_read.so", folder]
        return subprocess.run(
            [sys.executable, str(script), *map(str, places), *arguments],
            cwd=ROOT,
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="module")
def seen(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script wrote and said."""
    folder = tmp_path_factory.mktemp("gpu")
    done = program(folder, "--quick", "--no-checks", "--out", str(folder / "out" / "seen.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["seen.json"]
    made: dict[str, Any] = json.loads((folder / "out" / "seen.json").read_text())
    made["said"] = done.stdout.splitlines()
    assert made["failed"] == []
    assert "doing" not in made
    return made


@pytest.fixture(scope="module")
def alone(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What some of its functions make."""
    folder = tmp_path_factory.mktemp("alone")
    done = program(folder)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads((folder / "alone.json").read_text())
    return made


def _compile(variable: str, default: str, source: Path, target: Path, *options: str) -> None:
    language = "c" if source.suffix == ".c" else "c++"
    command = [os.environ.get(variable, default), "-O1", "-shared", "-fPIC", "-x", language]
    subprocess.run([*command, str(source), *options, "-o", str(target)], check=True)


def test_a_decoded_token_of_the_30b_is_164_launches(alone: dict[str, Any]) -> None:
    # 23 Mamba and 23 expert layers of 3, 6 attention layers of 4, embedding and head.
    assert alone["launches"] == 23 * 3 + 23 * 3 + 6 * 4 + 2 == 164


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
    assert min(seen["ceiling"]["copy"], seen["ceiling"]["read"], seen["build"]) > 0
    assert [row["part"] for row in seen["load"]] == [
        "decode", "cpu", "prefill", "generate", "long", "ops",
    ]  # fmt: skip
    assert min(row["seconds"] for row in seen["load"]) > 0
    assert seen["bundle"] == {"tiny": True}
    ways = [(row["overlap"], row["prefetch"]) for row in seen["boundary"]]
    assert ways == [(False, False), (False, True), (True, False), (True, True)]
    assert min(min(row["us"], row["step_us"]) for row in seen["boundary"]) > 0
    assert [(row["batch"], row["context"]) for row in seen["decode"]] == [
        (1, 0), (2, 0), (1, 3), (2, 3), (1, 5), (2, 5),
    ]  # fmt: skip
    assert [(row["tokens"], row["piece"]) for row in seen["prefill"]] == [(9, 9), (9, 4)]
    assert [row["tokens"] for row in seen["first_token"]] == [9]
    assert [row["batch"] for row in seen["generate"]] == [1, 2]
    ops = len(seen["ops"]) + len(seen["prompt_ops"])
    assert len(seen["said"]) == 1 + 2 + 6 + 6 + ops + 4 + 2 + 1 + 1 + 1 + 1 + 2 + 1
    assert all(op["share"] for op in seen["ops"] if op["bytes"])
    assert seen["gpu"]["cuda_driver"] == "12.6"
    assert {"commit", "date", "device", "version"} <= seen.keys()


def test_the_greedy_tokens_are_compared_with_the_cpus(seen: dict[str, Any]) -> None:
    compared = seen["cpu"]
    assert compared["rows"] == 3
    assert compared["wrong"] == 0
    assert compared["distance"] < 0.05  # tests/tolerances.py: 8-bit activations there, halves here


def test_rows_in_company_are_compared_with_the_same_alone(seen: dict[str, Any]) -> None:
    assert seen["batches"] == {"rows": 6, "context": 3, "unequal": {"1": 0, "2": 0}}


def test_steps_are_compared_with_the_same_launch_after_launch(seen: dict[str, Any]) -> None:
    assert seen["overlap"] == {"steps": 1, "context": 3, "unequal": {"1": 0, "2": 0}}


class Stepping:
    """A backend that counts the steps since it was reset."""

    vocab, slots, steps = 100, 8, 0

    def reset(self, slot: int) -> None:
        self.steps = 0

    def prefill(self, slot: int, tokens: Any) -> None:
        pass


def test_a_step_with_other_bits_where_launches_begin_early_is_found() -> None:
    class Racing(Stepping):
        """Its third step of eight sequences goes wrong where launches begin early."""

        def __init__(self) -> None:
            self._args_step = SimpleNamespace(flags=OVERLAP | PREFETCH)
            self._captured: dict[Any, Any] = {}

        def decode(self, slots: Sequence[int], fed: Sequence[int]) -> Any:
            self.steps += 1
            wrong = self._args_step.flags & OVERLAP and self.steps == 3 and len(slots) == 8
            return np.array([slots, fed], np.float32) + bool(wrong)

    backend = Racing()
    with pytest.raises(EdgeCascadeError, match=r"begin early: .*'unequal': {1: 0, 8: 1}"):
        gpu.told_overlap(backend, gpu.Plan(), lambda _: None)  # type: ignore[arg-type]
    assert backend._args_step.flags == OVERLAP | PREFETCH, "what comes next is as it was"


@pytest.mark.parametrize("mistake", ["company", "neighbour", "replay"])
def test_a_row_with_other_bits_in_company_is_found(mistake: str) -> None:
    class Wrong(Stepping):
        """A step's row is its slot and token, but for the mistake."""

        def decode(self, slots: Sequence[int], fed: Sequence[int]) -> Any:
            self.steps += 1
            rows = np.array([slots, fed], np.float32).T
            if mistake == "company" and len(slots) == 8:
                rows[7] = np.nextafter(rows[7], 1000)
            if mistake == "neighbour" and len(slots) > 1:
                rows[1] = rows[0]
            if mistake == "replay" and len(slots) == 2 and self.steps > 4:
                rows[0] = -1
            return rows

    with pytest.raises(EdgeCascadeError, match="rows have other bits in company") as caught:
        gpu.told_batches(Wrong(), gpu.Plan(), lambda _: None)  # type: ignore[arg-type]
    wrong = {
        "company": {1: 0, 2: 0, 4: 0, 8: 3},
        "neighbour": {1: 0, 2: 12, 4: 6, 8: 3},
        "replay": {1: 0, 2: 8, 4: 0, 8: 0},
    }
    assert str(wrong[mistake]) in str(caught.value)


def test_llm_generate_is_measured_in_empty_slots(alone: dict[str, Any]) -> None:
    """They were full: what was measured before leaves them so."""
    assert alone["answers"] == [2, 9]


def test_a_part_that_faults_dies_or_hangs_costs_no_other(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    parts = ("build", "decode", "cpu", "prefill", "generate")
    done = program(tmp_path, "--quick", "--out", str(out), "--parts", *parts, FAULTS="1")
    assert done.returncode == 1, done.stdout + done.stderr
    made = json.loads(out.read_text())
    lost = "cuMemsetD8Async: CUDA_ERROR_LAUNCH_FAILED (719)"
    assert made["failed"] == [
        "build: no compiler",
        *(f"decode {step}: {lost}" for step in [(2, 0), (1, 3), (2, 3)]),
        "cpu: status 7, at cpu",
        "prefill: status -9, ended after 15 s, at prefill (9, 9)",
    ]
    assert [(row["batch"], row["context"]) for row in made["decode"]] == [(1, 0)]
    assert [row["batch"] for row in made["generate"]] == [1, 2]
    assert made["gpu"]["built_for"]
    assert "ceiling" not in made
    assert "long" not in [row["part"] for row in made["load"]]


CHECK = """
import os, pytest, time
@pytest.mark.parametrize("isa", ["cuda", "cuda-emulated"])
def test_tables(isa):
    assert isa == "cuda" and os.environ["EDGECASCADE_TEST_GPU"] == "1"
    {}
"""
SANITIZER = """#!/bin/sh
echo "$@" | grep -q -- "--tool memcheck --error-exitcode 9" || exit 4
while [ "$1" != -m ]; do shift; done
{python} "$@" || exit
echo "========= Invalid __global__ read of size 4 bytes"
echo "=========     at moe_up(MoeArgs)+0x1b0"
exit 9
"""


def test_each_file_of_the_suite_is_a_check_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = {"fine": "pass", "dies": "os._exit(3)", "fails": "assert 0", "hangs": "time.sleep(60)"}
    tests = tmp_path / "tests"
    tests.mkdir()
    for name, work in works.items():
        (tests / f"test_{name}_kernels.py").write_text(CHECK.format(work))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(len(works)))
    report = Report(lambda _: None, tmp_path / "out.json")
    gpu.checked(report, "suite", 15.0)  # time for a slow machine to come to what hangs
    assert "1 passed, 1 deselected" in report.values["suite[fine]"]
    dies, fails, hangs = sorted(report.failed)
    assert dies.startswith("suite[dies]: status 3: ")
    assert fails.startswith("suite[fails]: status 1: ")
    assert "FAILED tests/test_fails_kernels.py::test_tables[cuda] - assert 0" in fails
    assert hangs.startswith("suite[hangs]: status -9: tests/test_hangs_kernels.py::test_tables[cud")
    assert hangs.endswith("], ended after 15 s")
    log = (tmp_path / "out.suite.log").read_text()
    assert all(f"test_{name}_kernels.py, status " in log for name in works)
    assert "    assert 0\n" in log


def test_what_compute_sanitizer_finds_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests, tool = tmp_path / "tests", tmp_path / "compute-sanitizer"
    tests.mkdir()
    (tests / "test_moe_kernels.py").write_text(CHECK.format("pass"))
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = Report(lambda _: None, tmp_path / "out.json")
    gpu.sanitized(report, "memcheck", 60.0)
    (failed,) = json.loads(report.out.read_text())["failed"]
    assert failed.startswith("memcheck[moe]: status 9: ")
    assert failed.splitlines()[1:] == [
        "  ========= Invalid __global__ read of size 4 bytes",
        "  =========     at moe_up(MoeArgs)+0x1b0",
    ]
    assert "test_tables[cuda] PASSED" in (tmp_path / "out.memcheck.log").read_text()


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


def test_a_report_says_what_goes_on_and_what_time_is_left(tmp_path: Path) -> None:
    report = Report(lambda _: None, tmp_path / "out.json", 25)

    def work() -> float:
        assert json.loads(report.out.read_text())["doing"] == ["outer", "inner"]
        return report.within(60)

    report.take("outer", lambda: report.take("inner", work))
    assert 9 < report.values["inner"] < 10  # half of it, and something is left for the end
    assert 19 < report.within(60, last=True) < 20
    assert report.within(3) == 3
    with pytest.raises(EdgeCascadeError, match="no time was left"):
        Report(lambda _: None, tmp_path / "other.json", 5).within(60)


def test_a_command_that_takes_too_long_is_ended_with_what_it_started() -> None:
    status, said = run_within(["sh", "-c", "echo out; echo err >&2; exit 3"], 60)
    assert (status, said) == (3, "out\nerr\n")
    start = monotonic()
    status, said = run_within(["sh", "-c", "echo begun; sleep 600 & wait"], 0.3)
    assert (status, said) == (-9, "begun\nended after 0 s\n")
    assert monotonic() - start < 60
