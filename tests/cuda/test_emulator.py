# SPDX-License-Identifier: Apache-2.0
"""What the emulator finds where no GPU is: kernels with one fault each (faulty.cu) end with a
sentence that names it.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from kernels import CUDA_EMULATED, build_emulated, cuda_emulated

SENTENCES = {
    "store-behind": "0 bytes behind the end of x, which has 200",
    "load-behind": "0 bytes behind the end of x, which has 200",
    "load-ahead": "4 bytes before the start of x, which has 200",
    "store-near-behind": "a thread wrote to 0 bytes behind the end of x, which has 200",
    "store-ahead": "a thread wrote to 4 bytes before the start of x, which has 200",
    "shared-behind": "8 bytes behind the end of the dynamic shared memory, which has 200",
    "shared-ahead": "4 bytes before the start of the dynamic shared memory, which has 200",
    "misaligned": r"is not aligned to 16 bytes at \S*faulty.cu:\d+",
    "misaligned-stream": r"is not aligned to 16 bytes at \S*platform.h:\d+",
    "misaligned-tile": r"is not aligned to 16 bytes at \S*platform.h:\d+",
    "unset-bool": r"a bool that is neither 0 nor 1 at \S*faulty.cu:\d+",
    "index": r"an index outside of its array at \S*faulty.cu:\d+",
    "overflow": r"a product that its type cannot hold at \S*faulty.cu:\d+",
    "conversion": r"a float that the integer cannot hold at \S*faulty.cu:\d+",
    "no-blocks": "a grid of 0 x 1 x 1 blocks",
}


@pytest.fixture(scope="module")
def faulty() -> Path:
    """The program of faulty.cu."""
    return build_emulated("edgecascade_cuda_faulty")


def run(faulty: Path, fault: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([faulty, fault], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("fault", SENTENCES)
def test_a_fault_ends_with_its_sentence(faulty: Path, fault: str) -> None:
    done = run(faulty, fault)
    assert re.fullmatch(f"emulator: .*{SENTENCES[fault]}.*\n", done.stderr)
    assert done.returncode in (-signal.SIGABRT, -signal.SIGSEGV)


def test_what_is_right_ends_well(faulty: Path) -> None:
    done = run(faulty, "none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_what_another_block_left_in_shared_variables_is_nan(faulty: Path) -> None:
    assert "nan" in run(faulty, "unset").stdout


def test_the_kernels_shared_variables_are_where_each_block_finds_them_unset() -> None:
    cuda_emulated()
    told = subprocess.run(["nm", "-C", CUDA_EMULATED], capture_output=True, text=True, check=True)
    # GCC takes those of templates elsewhere.
    elsewhere = re.findall(r"^\w+ [bBuV] (ec::cuda::.*>\(.*\)::\w+)$", told.stdout, re.MULTILINE)
    assert "routeCta" in told.stdout
    assert elsewhere == []
