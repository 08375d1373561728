# SPDX-License-Identifier: Apache-2.0
"""Root folders of three devices, each written anew for the test that asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_device import AGX_ORIN, ORIN_NX, THOR, Clock, write


@pytest.fixture
def orin_nx(tmp_path: Path) -> Path:
    return write(tmp_path / "orin-nx", ORIN_NX)


@pytest.fixture
def agx_orin(tmp_path: Path) -> Path:
    return write(tmp_path / "agx-orin", AGX_ORIN)


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    return write(tmp_path / "thor", THOR)


@pytest.fixture
def clock() -> Clock:
    return Clock()
