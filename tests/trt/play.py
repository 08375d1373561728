# SPDX-License-Identifier: Apache-2.0
"""The project's own build and run of an engine, with the driver in TensorRT's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from build_engine import compile_job
from build_engine.compile import build_engine as compile_engine
from build_engine.compile_job import Job
from edgecascade.backends import _trt_versions as versions
from edgecascade.backends import open_backend
from edgecascade.backends._lib import cuda_library
from edgecascade.bundle import Bundle

__all__ = ["Bundle", "build_engine", "cuda_library", "opened", "versions"]


def in_process(job: Path, variables: dict[str, str], progress: Any) -> dict[str, Any]:
    """The builder's child process without the process: there is no driver in a new one."""
    read = Job(**json.loads(job.read_text()))
    if read.bundle is None:
        return compile_job.run(read, compile_job._open_tensorrt(None), None, tell)
    with Bundle.open(read.bundle, verify=False) as bundle:
        return compile_job.run(read, compile_job._open_tensorrt(bundle), bundle, tell)


def tell(message: dict[str, Any]) -> None:
    """Progress, for nobody."""


@contextmanager
def building_here() -> Iterator[None]:
    """Engines are built in this process."""
    from build_engine import compile as module

    before: Callable[..., Any] = module._run
    module._run = in_process
    try:
        yield
    finally:
        module._run = before


def build_engine(bundle: Bundle) -> None:
    """Build the engine, store it where the backend looks for it, and have its tokens compared."""
    with building_here():
        compile_engine(bundle)


@contextmanager
def opened(path: Any, backend: str, **options: Any) -> Iterator[Any]:
    """A backend on a bundle."""
    with Bundle.open(path, verify=False) as bundle:
        made = open_backend(backend, bundle, **options)
        try:
            yield made
        finally:
            made.close()
