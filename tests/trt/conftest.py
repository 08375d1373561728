# SPDX-License-Identifier: Apache-2.0
"""What the tests of engines share: stand-ins compiled once, and bundles that may be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import standin
from alone import alone_in
from golden import Build


@pytest.fixture(scope="session")
def stand_ins(request: pytest.FixtureRequest) -> Path:
    """The folder with the compiled stand-ins."""
    folder: Path = request.config.cache.mkdir("trt")
    standin.compile_stand_ins(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(stand_ins: Path) -> standin.Prepared:
    """prepared(release) -> folder with the stand-ins and NVIDIA's bindings of that release."""
    folder = stand_ins

    def with_release(release: str) -> Path:
        try:
            with alone_in(folder):
                standin.download(release, folder)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or str(error)).strip().splitlines()[-1]
            if "CI" in os.environ:
                pytest.fail(f"{standin.BINDINGS[release]} cannot be had: {said}")
            pytest.skip(f"{standin.BINDINGS[release]} cannot be had from PyPI: {said}")
        return folder

    return with_release


@pytest.fixture
def own_bundle(build: Build, tmp_path: Path) -> Callable[[str, str], Path]:
    """own_bundle(golden, precision) -> a copy, into which an engine can be written."""

    def copy(name: str, precision: str) -> Path:
        return Path(shutil.copytree(build(name, precision), tmp_path / f"{name}-{precision}"))

    return copy
