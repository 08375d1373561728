# SPDX-License-Identifier: Apache-2.0
"""The plugins and NVIDIA's bindings of four TensorRT releases: every rule kept, every breach seen.

Judged by NVIDIA's own plugin classes and by tests/trt/driver.py, which plays the builder and the
runtime. No part of TensorRT's library runs here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import standin

MUTATIONS = 37
REFUSALS = 10


@pytest.mark.parametrize("release", standin.BINDINGS)
def test_plugins_keep_the_contract_and_no_breach_of_it_goes_unseen(
    prepared: standin.Prepared, own_bundle: Callable[[str, str], Path], release: str
) -> None:
    program = [sys.executable, str(standin.HERE / "mutations.py"), release]
    arguments = [str(prepared(release)), str(own_bundle("moe", "speed"))]
    done = subprocess.run(
        [*program, *arguments], cwd=standin.ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    (name, how), *broken = [json.loads(line) for line in done.stdout.splitlines()]
    assert (name, how) == ("nothing is broken", "passed"), done.stderr
    assert len(broken) == MUTATIONS + REFUSALS
    unseen = [name for name, how in broken if how == "passed"]
    assert not unseen
