# SPDX-License-Identifier: Apache-2.0
"""The main job on one page: a checkpoint becomes a bundle, which answers, also over MQTT.

    make demo

The checkpoint in examples/tiny/ has the family's shape and random weights: its words mean nothing,
its numbers are known exactly, because transformers computed them (tests/make_goldens.py).
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from build_engine.pipeline import build
from edgecascade import LLM
from edgecascade.client import Client
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import Service

TINY = Path(__file__).resolve().parent / "tiny"
COMMAND = "Drive to the charging dock."
PROMPT_TOKENS = (1, 3, 37, 129, 500)
TOLERANCE = 2e-4  # float32 sums in another order than transformers', on logits of about 4


def check_exact(bundle: Path, golden: Any) -> list[str]:
    """Float32 weights: logits and greedy tokens are those of transformers."""
    failures = []
    with LLM.load(bundle, "cpu") as llm:
        for tokens in PROMPT_TOKENS:
            rows = llm.logits(golden[f"{tokens}.ids"])[golden[f"{tokens}.rows"]]
            error = float(np.abs(rows - golden[f"{tokens}.logits"]).max())
            print(f"  logits of {tokens:3d} tokens: largest difference {error:.1e}")
            if error > TOLERANCE:
                failures.append(f"logits of {tokens} tokens differ by {error:.1e} > {TOLERANCE}")
        want = tuple(golden["greedy.ids"].tolist())
        answer = llm.generate(COMMAND, temperature=0, max_tokens=len(want))
        print(f"  greedy answer: {'the same' if answer.token_ids == want else 'other'} tokens")
        if answer.token_ids != want:
            failures.append(f"greedy tokens are {answer.token_ids}, expected {want}")
    return failures


def run_int4(bundle: Path) -> list[str]:
    """INT4 weights: stream an answer, then the same prompt among seven others."""
    alone = None
    with LLM.load(bundle, "cpu") as llm:
        print(f"> {COMMAND}")
        for piece in llm.stream(COMMAND, seed=7, max_tokens=128, ignore_eos=True):
            noise = piece.reasoning + piece.text
            print("".join(c if c.isprintable() else "." for c in noise), end="", flush=True)
            alone = piece.completion
        assert alone is not None  # the last piece carries it
        times = alone.timings
        print(
            f"\n  prefill {alone.usage.prompt_tokens} tokens in {times.prefill_s * 1e3:.1f} ms,",
            end="",
        )
        print(f" decode {times.decode_tokens_per_s:.0f} tokens/s")
        others = [f"{COMMAND} {i}" for i in range(7)]
        together = llm.generate([*others, COMMAND], seed=7, max_tokens=128, ignore_eos=True)
    if together[-1].token_ids != alone.token_ids:
        return ["the INT4 bundle answers otherwise among eight sequences than alone"]
    print("  the same tokens alone and among eight sequences")
    return []


def ask_over_mqtt(bundle: Path, folder: Path) -> list[str]:
    """A broker on loopback, the bundle behind it, a client that asks: the tokens are the same."""
    options = {"seed": 7, "temperature": 0.8, "max_tokens": 48}
    with LLM.load(bundle, "cpu") as llm, LocalBroker() as broker:
        alone = llm.generate(messages=[{"role": "user", "content": COMMAND}], **options)
        config = ServiceConfig(mqtt=broker.url, device_id="demo", state_dir=str(folder))
        with Service(llm, config) as service, Client(broker.url) as client:
            runner = threading.Thread(target=service.run)
            runner.start()
            try:
                stream = client.stream("demo", COMMAND, **options)
                pieces = [piece.reasoning + piece.text for piece in stream]
            finally:
                service.stop()
                runner.join()
    answer = stream.answer
    print(f"  {broker.program.kind} at {broker.url}: {len(pieces)} pieces, ", end="")
    print(f"{answer.usage['completion_tokens']} tokens, first after ", end="")
    print(f"{answer.body['timings']['ttft_ms']:.1f} ms")
    if (answer.reasoning, answer.text) != (alone.reasoning, alone.text):
        return ["the answer over MQTT is another than that of generate"]
    if "".join(pieces) != answer.reasoning + answer.text:
        return ["the stream over MQTT does not add up to its answer"]
    print("  the same answer over MQTT, streamed")
    return []


def main() -> int:
    with np.load(TINY / "golden.npz") as arrays:
        golden = dict(arrays)
    with tempfile.TemporaryDirectory(prefix="edgecascade-demo-") as folder:
        exact, int4 = Path(folder) / "exact", Path(folder) / "speed"
        print(f"building two bundles from {TINY.name}/checkpoint: float32 and INT4")
        build(TINY / "checkpoint", exact, precision="exact")
        build(TINY / "checkpoint", int4, precision="speed")
        print("float32 bundle against transformers")
        failures = check_exact(exact, golden)
        print("INT4 bundle")
        failures += run_int4(int4)
        print("over MQTT")
        failures += ask_over_mqtt(int4, Path(folder))
    for failure in failures:
        print(f"FAIL: {failure}", file=sys.stderr)
    if not failures:
        print("PASS")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
