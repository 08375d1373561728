# SPDX-License-Identifier: Apache-2.0
"""Goldens, and bundles built from them once a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import terminal
from golden import GOLDENS, Build, Golden, load_golden
from hypothesis import HealthCheck, settings

# An example may take as long as it likes: nothing here says how fast a machine must be.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

MOST_WORKERS = 8  # the kernels bring threads of their own


def pytest_configure() -> None:
    """Here pytest has not yet taken file 2, or gives it back for a moment."""
    terminal.stderr = os.dup(2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: much of the suite waits for brokers and processes."""
    return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)


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
