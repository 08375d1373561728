# SPDX-License-Identifier: Apache-2.0
"""Faults, counted: what the update machinery was put through and survived.

A class of faults is a module in this package, named in `CLASSES`, with

    TITLE: str              what is done to it, in a few words
    FULL: int               how many faults the 5-minute form tries, at least
    SHORT: int              how many the short form of the test suite tries
    def run(seed: int, count: int, case: str | None) -> Outcome

`run` tries at least `count` faults, every choice drawn from `random.Random(seed)`, and names each
case with a text from which `run(seed, count, case)` repeats that one alone. What cannot run on this
machine is `Outcome(skipped="why")`: it is printed and never counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

# Name -> module of this package.
CLASSES: dict[str, str] = {
    "F1": "crash",
    "F2": "mutants",
    "F3": "kills",
    "F4": "images",
    "F5": "lies",
    "F6": "disk",
    "F7": "flips",
    "F8": "http",
    "F9": "messages",
    "F10": "brokers",
    "F11": "attacks",
    "F12": "clocks",
    "F13": "rollouts",
    "F14": "network",
}


@dataclass(frozen=True)
class Failure:
    """A fault that was not survived; `case` repeats it."""

    case: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """What one class of faults did. A fault not in `failures` was survived."""

    tried: int = 0
    failures: tuple[Failure, ...] = ()
    skipped: str = ""  # why nothing was tried
    notes: Mapping[str, Any] = field(default_factory=dict)  # for the JSON file


def load(name: str) -> ModuleType:
    """The module of a class of faults."""
    return import_module(f"{__name__}.{CLASSES[name]}")
