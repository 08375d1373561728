# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the repository with what transformers answered for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
