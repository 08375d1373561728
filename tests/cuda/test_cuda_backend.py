# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend with its real kernels, emulated, and graphs captured by a stand-in driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tolerances
from golden import Build
from kernels import CUDA_EMULATED, cuda_emulated

from edgecascade import LLM
from edgecascade.backends._lib import OVERLAP, PREFETCH, open_cuda_library
from edgecascade.backends.base import open_backend
from edgecascade.backends.cuda import step_flags
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable, InvalidRequest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the driver's stand-in."""
    folder = tmp_path_factory.mktemp("driver")
    source = HERE.parent / "trt" / "fakecuda.c"
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def run(program: str, driver: Path, bundle: Path, *more: str) -> dict[str, Any]:
    """What a program of this folder saw."""
    cuda_emulated()  # builds it
    command = [sys.executable, str(HERE / program), str(driver), str(CUDA_EMULATED), str(bundle)]
    command += more
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.fixture(scope="module")
def sampled(driver: Path, build: Build) -> dict[str, Any]:
    """What sampling_program.py saw."""
    return run("sampling_program.py", driver, build("tiny", "speed"))


@pytest.mark.parametrize(
    ("precision", "kv", "bound"),
    [
        ("exact", "f32", tolerances.CUDA_EXACT),
        ("exact", "int8", tolerances.HALF_ATTENTION),
        ("speed", "f16", tolerances.INT8_ACTIVATIONS),
    ],
)
def test_it_computes_what_the_cpu_does(
    driver: Path, build: Build, precision: str, kv: str, bound: float
) -> None:
    seen = run("backend_program.py", driver, build("tiny", precision), kv)
    for what in ("logits", "prefill", "decode", "held", "moved"):
        assert seen[what] <= bound, seen
    assert seen["margin_flips"] == 0
    assert seen["again"], "a prompt gives the same bits again"
    assert seen["kept"], "later steps leave logits as they were"
    assert seen["captured"] == [[1, 512], [2, 512], [3, 512]]
    if precision == "speed":
        check_prefetches(seen["prefetched"])


def check_prefetches(lines: dict[str, list[int]]) -> None:
    """Every matrix whose place the launch before knows, a quarter of the emulator's L2 of it."""
    matrices = {"in_proj": 2, "out_proj": 2, "router": 2, "shared_down": 2, "qkv": 1, "o_proj": 1,
                "lm_head": 1}  # fmt: skip
    least = 16384 // 4 // 128
    for name, (brought, there) in lines.items():
        if name != "conv_weight":  # which the Mamba step itself prefetches
            assert brought == least * matrices.get(name, 0), name
            assert brought <= there, name


def test_a_token_drawn_on_the_device_is_the_cpus(sampled: dict[str, Any]) -> None:
    assert sampled["draws"] == 4 * 3 * 3 * 2 * 2
    assert sampled["differ"] == []
    assert sampled["logprob"] <= 2 * tolerances.LOGPROB  # each is so close to the definition
    assert sampled["apart"] == 0, "a row gets its token whatever is drawn beside it"
    assert sampled["one"], "and so does a prompt's last row"


def test_what_cannot_be_drawn_is_named(sampled: dict[str, Any]) -> None:
    assert sampled["outside"].startswith("InvalidRequest: row 1 has 1 seen tokens from 9999")
    assert sampled["too_few"].startswith("InvalidRequest: sample needs logits [1..4, 512]")
    assert sampled["no_token"].startswith("BackendError: no token can be chosen for row 1: all 512")


def test_a_token_moves_a_few_bytes_and_not_its_logits(sampled: dict[str, Any]) -> None:
    row = 4 * sampled["vocab"]
    assert sampled["downloaded"] <= 24 * sampled["tokens"] < row * sampled["tokens"] / 40
    assert sampled["downloaded_with_logprobs"] >= 9 * row, "the floats come when they are asked for"


def test_answers_on_the_device_are_those_of_a_lone_run(sampled: dict[str, Any]) -> None:
    assert sampled["same"] == [True, True, True]
    assert sampled["told"], "logprobs change no token"
    assert sampled["best"]


def test_a_lost_gpu_is_an_error_each_time_and_auto_takes_the_cpu(
    sampled: dict[str, Any],
) -> None:
    assert len(sampled["lost"]) == 2
    for told in sampled["lost"]:
        assert told.startswith("BackendError: "), told
        assert "CUDA_ERROR_LAUNCH_FAILED" in told
    assert sampled["next"] == "cpu"


def test_a_prompt_is_read_in_larger_pieces_than_on_a_cpu(
    sampled: dict[str, Any], build: Build
) -> None:
    assert sampled["pieces"] == 512
    with LLM.load(build("tiny", "speed"), "cpu") as llm:
        assert llm.rule.chunk_tokens == 256
    with LLM.load(build("tiny", "speed"), "cpu", chunk_tokens=512) as llm:
        assert llm.rule.chunk_tokens == 512


def test_launches_begin_early_or_prefetch_as_the_device_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OVERLAP", "PREFETCH"):
        monkeypatch.delenv(f"EDGECASCADE_CUDA_{name}", raising=False)
    assert step_flags(87) & PREFETCH
    assert not step_flags(90) & PREFETCH
    assert step_flags(90) & OVERLAP
    monkeypatch.setenv("EDGECASCADE_CUDA_OVERLAP", "0")
    monkeypatch.setenv("EDGECASCADE_CUDA_PREFETCH", "1")
    assert step_flags(110) == PREFETCH
    monkeypatch.setenv("EDGECASCADE_CUDA_PREFETCH", "yes")
    with pytest.raises(InvalidRequest, match="EDGECASCADE_CUDA_PREFETCH is 'yes'"):
        step_flags(87)


def test_without_a_driver_or_the_library_it_says_so(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle, pytest.raises(BackendUnavailable) as caught:
        open_backend("cuda", bundle)
    assert "NVIDIA" in str(caught.value) or "make setup" in str(caught.value)


def test_a_library_without_a_table_says_why(tmp_path: Path) -> None:
    says = "driver version is insufficient (built with CUDA 13.0, the driver is of CUDA 12.6)"
    source = tmp_path / "none.c"
    source.write_text(
        "const void* ec_cuda(void) { return 0; }\n"
        f'const char* ec_cuda_problem(void) {{ return "{says}"; }}\n'
    )
    library = tmp_path / "none.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(BackendUnavailable) as caught:
        open_cuda_library(library)
    assert says in str(caught.value)
    assert "make setup" in str(caught.value)
