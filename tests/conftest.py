# SPDX-License-Identifier: Apache-2.0
"""Goldens, and bundles built from them once a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

TESTS = Path(__file__).resolve().parent
TINY = TESTS.parent / "examples" / "tiny"
GOLDENS = {path.parent.name: path for path in sorted(TESTS.glob("goldens/*/golden.npz"))}
GOLDENS["tiny"] = TINY / "golden.npz"

Build = Callable[[str, str], Path]


@dataclass(frozen=True)
class Golden:
    """What transformers answered for one checkpoint; tests/make_goldens.py names the arrays."""

    name: str
    checkpoint: Path
    arrays: Mapping[str, NDArray[Any]]

    def __getitem__(self, key: str) -> NDArray[Any]:
        return self.arrays[key]


def load_golden(name: str) -> Golden:
    file = GOLDENS[name]
    checkpoint = file.parent / "checkpoint" if name == "tiny" else file.parent
    with np.load(file) as arrays:
        return Golden(name, checkpoint, dict(arrays))


@pytest.fixture(scope="session", params=sorted(GOLDENS))
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    """The checkpoint of the demo: MoE, with a tokenizer and a chat template."""
    return load_golden("tiny")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stamps and caches of a test run stay out of the user's folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(golden name, precision) -> path of a bundle that tests share and must not change."""
    from build_engine.pipeline import build as build_bundle

    built: dict[tuple[str, str], Path] = {}

    def bundle(name: str, precision: str) -> Path:
        key = (name, precision)
        if key not in built:
            out = tmp_path_factory.mktemp("bundles") / f"{name}-{precision}"
            build_bundle(load_golden(name).checkpoint, out, precision=precision)
            built[key] = out
        return built[key]

    return bundle
