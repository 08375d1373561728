# SPDX-License-Identifier: Apache-2.0
"""A bundle's engine, built and opened with the driver in TensorRT's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import driver

from build_engine.graph import to_onnx
from edgecascade.backends import _trt_versions as versions
from edgecascade.backends import open_backend
from edgecascade.backends._cuda import open_device
from edgecascade.backends._lib import cuda_library
from edgecascade.backends._trt_plugins import register
from edgecascade.backends.tensorrt import key_here
from edgecascade.bundle import Bundle
from edgecascade.engines import write_engine
from edgecascade.trace import dims, profiles, trace_bundle


def build_plan(player: driver.Play, bundle: Bundle) -> bytes:
    """The exported graph through the plugins' build phase, with both profiles."""
    graph = trace_bundle(bundle)
    network = driver.Network(player)
    network.parse(to_onnx(graph))
    bounds = [
        {name: dims(tensor, profile) for name, tensor in graph.inputs.items()}
        for profile in profiles(graph, bundle.max_context)
    ]
    return driver.build(network, bounds)


def build_engine(player: driver.Play, trt: ModuleType, bundle: Bundle) -> None:
    """Build the engine and store it where the backend looks for it."""
    device = open_device()
    register(trt, cuda_library(), device.copy)
    write_engine(bundle, key_here(bundle, trt, device), build_plan(player, bundle), {})


__all__ = ["Bundle", "build_engine", "build_plan", "cuda_library", "opened", "versions"]


@contextmanager
def opened(path: Any, backend: str, **options: Any) -> Iterator[Any]:
    """A backend on a bundle."""
    with Bundle.open(path, verify=False) as bundle:
        made = open_backend(backend, bundle, **options)
        try:
            yield made
        finally:
            made.close()
