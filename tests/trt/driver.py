# SPDX-License-Identifier: Apache-2.0
"""Plays TensorRT: what its library would do with our plugins, and what it would never forgive.

    contract.py   what the builder asks of one plugin, in the order recorded from NVIDIA's builder
    builder.py    a network out of an ONNX graph, and a plan out of a network
    runtime.py    engines and contexts; the memory around every plugin's work is watched

`play(trt)` puts these in the place of the library that NVIDIA's bindings lack here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from builder import Builder, Parser
from contract import ContractError, Play, Sizes, need
from runtime import Runtime

__all__ = ["ContractError", "Play", "Sizes", "need", "play"]


class Registry:
    """IPluginRegistry."""

    def __init__(self, play: Play) -> None:
        self._play = play

    def register_creator(self, creator: Any, namespace: str) -> bool:
        need(creator.plugin_namespace == namespace, "a creator is registered under its namespace")
        key = (creator.name, creator.plugin_version, namespace)
        known = key in self._play.creators
        self._play.creators.setdefault(key, creator)
        return not known


def play(trt: ModuleType) -> Play:
    """Put the driver in TensorRT's place."""
    made = Play(trt)
    registry = Registry(made)
    played: dict[str, Any] = {
        "get_plugin_registry": lambda: registry,
        "Builder": type("Builder", (Builder,), {"play": made}),
        "OnnxParser": Parser,
        "Runtime": type("Runtime", (Runtime,), {"play": made}),
    }
    for name, value in played.items():
        setattr(trt, name, value)
    return made
