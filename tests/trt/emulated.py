# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source behind the plugins, compiled for the CPU (plugins/cuda/emulator).

    python tests/trt/emulated.py RELEASE FOLDER BUNDLE LIBRARY     one line of JSON

Their launches go through the stand-in for the driver, so that decode is captured and replayed here,
too. What is seen: how far the logits are from the reference, that every plugin stays in its memory,
and that a replayed step is the first one again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import standin

RELEASE, (FOLDER, BUNDLE, LIBRARY) = sys.argv[1], map(Path, sys.argv[2:])
trt = standin.load(RELEASE, FOLDER)
os.environ["EDGECASCADE_CUDA_LIBRARY"] = str(LIBRARY)

import driver  # noqa: E402
import play  # noqa: E402


def distance(found: Any, truth: Any) -> float:
    """Relative, without the rows' means, which no softmax sees."""
    found, truth = (x - x.mean(axis=-1, keepdims=True) for x in (found, truth))
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def main() -> dict[str, float]:
    player = driver.play(trt)
    player.one_launch_each = False
    with play.Bundle.open(BUNDLE, verify=False) as bundle:
        play.build_engine(bundle)
    seen = {}
    with (
        play.opened(BUNDLE, "tensorrt", threads=1) as engine,
        play.opened(BUNDLE, "reference") as reference,
    ):
        tokens = np.random.default_rng(2).integers(3, engine.vocab, 40).astype(np.int32)
        both = (engine, reference)
        for slot, length in enumerate((40, 1, 7)):
            rows = [np.asarray(each.prefill(slot, tokens[:length])) for each in both]
            seen[f"prefill of {length}"] = distance(*rows)
        for slots in ([0], [2, 0, 1], [1], [0, 1, 2]):  # the last two are replayed
            rows = [np.asarray(each.decode(slots, [5] * len(slots))) for each in both]
            seen[f"decode of {slots}"] = distance(*rows)
    return seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()) + "\n")
