# SPDX-License-Identifier: Apache-2.0
"""Whether TensorRT works here, from the graph to the tokens, on a small model that it makes itself.

The report is what a Jetson's owner sends when something fails, and when nothing does: TensorRT's
own library on a Jetson is what this project cannot run in its tests.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from build_engine.compile import build_engine
from build_engine.synthetic import config, write_random
from edgecascade.backends.base import open_backend
from edgecascade.bundle import Bundle
from edgecascade.errors import BuildError, EdgeCascadeError

log = logging.getLogger(__name__)

# Every kind of layer, two pages of context, and sizes that are small but the real ones' multiples.
SMALL: dict[str, Any] = {
    "hybrid_override_pattern": "ME*-ME",
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "intermediate_size": 640,
    "mamba_num_heads": 8,
    "n_groups": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 256,
}
PROMPT, STEPS, SEED = 150, 32, 5
CLOSE = 0.1  # relative distance of logits: the CPU rounds activations to int8, CUDA to half


def prove() -> dict[str, Any]:
    """Build a small engine, run it beside the CPU backend, and say how far it came.

    `stage` is the last one begun; `error` is None when all went well.
    """
    report: dict[str, Any] = {"stage": "begin", "error": None}
    with TemporaryDirectory(prefix="edgecascade-prove-") as folder:
        try:
            _stages(Path(folder), report)
        except EdgeCascadeError as error:
            report["error"] = f"{type(error).__name__}: {error}"
    return report


def _stages(folder: Path, report: dict[str, Any]) -> None:
    report["stage"] = "write a small model"
    raw = {**config("nemotron-3-nano-30b"), **SMALL}
    path = write_random(folder / "bundle", raw, {"made": "to prove an engine"})
    with Bundle.open(path) as bundle:
        report["stage"] = "build its engine and compare tokens"
        _, made = build_engine(bundle)
        report["build"] = made.facts
        report["key"] = made.key and asdict(made.key)
        report["tokens"] = made.accepted and asdict(made.accepted)
        report["stage"] = "decode one and eight sequences"
        report["decode"] = _decode(bundle)
    report["stage"] = "done"


def _decode(bundle: Bundle) -> dict[str, Any]:
    """Speed, whether steps are captured, and how far the logits are from the CPU's."""
    prompt = np.random.default_rng(SEED).integers(3, SMALL["vocab_size"], PROMPT).astype(np.int32)
    with (
        closing(open_backend("tensorrt", bundle)) as backend,
        closing(open_backend("cpu", bundle)) as cpu,
    ):
        report: dict[str, Any] = {"distance": 0.0}
        for count in (1, 8):
            slots = list(range(count))
            for slot in slots:
                for each in (backend, cpu):
                    each.reset(slot)
                    each.prefill(slot, prompt[slot:])
            started = time.perf_counter()
            rows = [np.asarray(backend.decode(slots, [5 + step] * count)) for step in range(STEPS)]
            report[f"ms_per_step_of_{count}"] = (time.perf_counter() - started) / STEPS * 1e3
            expected = [np.asarray(cpu.decode(slots, [5 + step] * count)) for step in range(STEPS)]
            found, truth = np.concatenate(rows), np.concatenate(expected)
            distance = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
            report["distance"] = max(report["distance"], distance)
        report["captured"] = getattr(backend, "captured", [])
        if not report["distance"] <= CLOSE:
            raise BuildError(
                f"logits are {report['distance']:.3f} away from the CPU's, {CLOSE} is the limit"
            )
        return report
