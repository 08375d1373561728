# SPDX-License-Identifier: Apache-2.0
"""Cross-built for aarch64, the library passes the op tests under qemu, with this machine's bits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
NEEDED = ["cmake", "aarch64-linux-gnu-g++", "qemu-aarch64"]
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{MISSING} not found: apt install cmake g++-aarch64-linux-gnu qemu-user",
)


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    run(["cmake", "-S", PLUGINS, "-B", folder, "-DEC_TESTS=ON", *options])
    run(["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    return folder / "tests" / "op_test"


def results(output: str) -> dict[str, tuple[int, int, str]]:
    """ISA -> checks passed, checks failed, hash of linear's results."""
    found = re.findall(r"^(\S+): (\d+) passed, (\d+) failed, linear ([0-9a-f]{16})$", output, re.M)
    return {isa: (int(passed), int(failed), digest) for isa, passed, failed, digest in found}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> str:
    """op_test's output on this machine."""
    return run([build(tmp_path_factory.mktemp("native"))])


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """op_test for aarch64."""
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={PLUGINS / 'aarch64.cmake'}"
    return build(tmp_path_factory.mktemp("aarch64"), toolchain)


def test_op_tests_pass_here(here: str) -> None:
    ran = results(here)
    assert "portable" in ran
    assert all(passed > 500 and failed == 0 for passed, failed, _ in ran.values())


def test_op_tests_pass_under_qemu_with_the_same_bits(here: str, aarch64: Path) -> None:
    ran = results(run([*QEMU, "-cpu", "max", aarch64]))
    assert set(ran) == {"portable", "neon", "i8mm"}
    assert all(passed > 500 and failed == 0 for passed, failed, _ in ran.values())
    digests = {digest for _, _, digest in [*ran.values(), *results(here).values()]}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("cpu", "isas"), [("cortex-a76", {"portable", "neon"}), ("cortex-a57", {"portable"})]
)
def test_older_cores_get_the_kernels_they_can_run(aarch64: Path, cpu: str, isas: set[str]) -> None:
    """Cortex-A76 (as in Orin's A78AE) has the dot product but no i8mm, Cortex-A57 has neither."""
    ran = results(run([*QEMU, "-cpu", cpu, aarch64]))
    assert set(ran) == isas
    assert all(passed > 500 and failed == 0 for passed, failed, _ in ran.values())
