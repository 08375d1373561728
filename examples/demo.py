# SPDX-License-Identifier: Apache-2.0
"""The main job on one page: a robot's language model takes commands, also over MQTT.

    make demo

Two checkpoints are in the box. examples/tiny has random weights: its words mean nothing, its
numbers are known exactly, because transformers computed them. examples/demo_model is trained on
commands for a robot: its INT4 bundle must give the recorded answers, which
`python examples/demo.py --record` writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from build_engine.pipeline import build
from edgecascade import LLM
from edgecascade.client import Client
from edgecascade.completion import Completion
from edgecascade.evaluation import evaluate
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import Service
from edgecascade.suite import find_suite, read_suite

EXAMPLES = Path(__file__).resolve().parent
TINY = EXAMPLES / "tiny"
ROBOT = EXAMPLES / "demo_model"
GOLDEN = ROBOT / "answers.json"
TOOLS = json.loads((ROBOT / "tools.json").read_text())
PROMPT_TOKENS = (1, 3, 37, 129, 500)
TOLERANCE = 2e-4  # float32 sums in another order than transformers', on logits of about 4
SAMPLES = 40  # of each split of the suite
STATE = "You are a helpful robot.\nbattery: 41%\nlocation: workshop\nholding: nothing"


@dataclass(frozen=True)
class Scene:
    """A command, and what the robot is told beside it."""

    text: str
    system: str | None = None
    thinking: bool = True

    @property
    def messages(self) -> list[dict[str, str]]:
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*told, {"role": "user", "content": self.text}]


PLAN = Scene(
    "First pick up the red box from the shelf, then deliver it to Anna, and finally return to the "
    "dock."
)
SCENES = (
    Scene("Drive forward two and a half metres."),
    PLAN,
    Scene("Turn left by 90 degrees, then move forward 150 cm.", thinking=False),
    Scene("How full is your battery?", system=STATE),
    Scene("Where are you?"),
    Scene("Drive 3 feet forward."),
    Scene("Ram into the wall at full speed."),
    Scene("Wie spät ist es in Tokio?"),
    Scene("asdf qwer zxcv"),
)


def check_exact(folder: Path) -> list[str]:
    """Float32 weights: logits and greedy tokens are those of transformers."""
    failures = []
    with np.load(TINY / "golden.npz") as arrays:
        golden = dict(arrays)
    build(TINY / "checkpoint", folder / "exact", precision="exact")
    with LLM.load(folder / "exact", "cpu") as llm:
        for tokens in PROMPT_TOKENS:
            rows = llm.logits(golden[f"{tokens}.ids"])[golden[f"{tokens}.rows"]]
            error = float(np.abs(rows - golden[f"{tokens}.logits"]).max())
            print(f"  logits of {tokens:3d} tokens: largest difference {error:.1e}")
            if error > TOLERANCE:
                failures.append(f"logits of {tokens} tokens differ by {error:.1e} > {TOLERANCE}")
        want = tuple(golden["greedy.ids"].tolist())
        text = "Drive to the charging dock."
        answer = llm.generate(text, temperature=0, max_tokens=len(want))
        print(f"  greedy answer: {'the same' if answer.token_ids == want else 'other'} tokens")
        if answer.token_ids != want:
            failures.append(f"greedy tokens are {answer.token_ids}, expected {want}")
    return failures


def command_robot(llm: LLM, golden: dict[str, Any]) -> list[str]:
    """Each command streamed, then all of them side by side: twice the recorded answers."""
    failures = []
    alone = [stream(llm, scene) for scene in SCENES]
    together = asyncio.run(at_once(llm))
    for scene, one, other in zip(SCENES, alone, together, strict=True):
        if facts(one) != golden["answers"].get(scene.text):
            failures.append(f"{scene.text!r} is not answered as recorded: {facts(one)}")
        if one.token_ids != other.token_ids:
            failures.append(f"{scene.text!r} is answered otherwise in company than alone")
    times = max(alone, key=lambda answer: len(answer.token_ids)).timings
    print(f"  alone {times.decode_tokens_per_s:.0f} tokens/s", end="")
    print("; side by side the same tokens" if not failures else "")
    return failures


def stream(llm: LLM, scene: Scene) -> Completion:
    """Show an answer as it comes: what it thinks in brackets, what it says, what it calls."""
    state = "".join(f"  [{line}]" for line in (scene.system or "").splitlines()[1:])
    print(f"> {scene.text}{state}")
    answer, thinking = None, False
    for piece in llm.stream(messages=scene.messages, tools=TOOLS, thinking=scene.thinking):
        if piece.reasoning and not thinking:
            print("  (", end="")
            thinking = True
        if thinking and (piece.text or piece.tool_calls):
            print(")")
            thinking = False
        print(piece.reasoning.replace("\n", "; ") + piece.text, end="", flush=True)
        for call in piece.tool_calls:
            print(f"  {call}")
        answer = piece.completion
    assert answer is not None  # the last piece carries it
    print("\n" * bool(answer.text), end="")
    return answer


async def at_once(llm: LLM) -> list[Completion]:
    asked = (
        llm.agenerate(messages=scene.messages, tools=TOOLS, thinking=scene.thinking)
        for scene in SCENES
    )
    return await asyncio.gather(*asked)


def facts(answer: Any) -> dict[str, Any]:
    """What of an answer is recorded."""
    return {
        "reasoning": answer.reasoning,
        "content": answer.text,
        "tool_calls": [vars(call) for call in answer.tool_calls],
    }


def count_right(llm: LLM) -> dict[str, int]:
    """Right answers of each split of the suite."""
    result = evaluate(llm, read_suite(find_suite("robot")).part(limit=SAMPLES))
    right = {split: result.figures(split).exact for split in result.splits}
    for split, share in right.items():
        print(f"  {split:13} {share.count:2} of {share.of} right")
    print(f"  {result.tokens_per_s:.0f} tokens/s, {llm.slots} answers side by side")
    return {split: share.count for split, share in right.items()}


def ask_over_mqtt(bundle: Path, folder: Path, golden: dict[str, Any]) -> list[str]:
    """A broker on loopback, the bundle behind it, a client that asks: the answer is the same."""
    with LLM.load(bundle, "cpu") as llm, LocalBroker() as broker:
        config = ServiceConfig(mqtt=broker.url, device_id="robot-7", state_dir=str(folder))
        with Service(llm, config) as service, Client(broker.url) as client:
            runner = threading.Thread(target=service.run)
            runner.start()
            try:
                stream = client.stream("robot-7", PLAN.messages, tools=TOOLS)
                thought = "".join(piece.reasoning for piece in stream)
            finally:
                service.stop()
                runner.join()
    answer = stream.answer
    print(f"  {broker.program.kind} at {broker.url}; {answer.device} answers: ", end="")
    print(", ".join(map(str, answer.tool_calls)))
    times = answer.body["timings"]
    print(f"  first token after {times['ttft_ms']:.1f} ms, {times['tok_s']:.0f} tokens/s")
    if thought != answer.reasoning:
        return ["the stream over MQTT does not add up to its answer"]
    if facts(answer) != golden["answers"].get(PLAN.text):
        return [f"over MQTT {PLAN.text!r} is not answered as recorded: {facts(answer)}"]
    return []


def record() -> None:
    """Write what the bundle answers now."""
    with LLM.load(ROBOT / "bundle", "cpu") as llm:
        made = {
            "answers": {scene.text: facts(stream(llm, scene)) for scene in SCENES},
            "right": count_right(llm),
        }
    GOLDEN.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def run(folder: Path) -> list[str]:
    golden = json.loads(GOLDEN.read_text())
    print("the arithmetic: float32 weights against transformers, random numbers")
    failures = check_exact(folder)
    print("the robot's model, trained on commands: an INT4 bundle of its checkpoint")
    build(ROBOT / "checkpoint", folder / "robot", precision="speed")
    with LLM.load(folder / "robot", "cpu") as llm:
        failures += command_robot(llm, golden)
        print(f"the suite: {SAMPLES} samples of each split")
        right = count_right(llm)
    # Another instruction set may break a tie otherwise: one answer a split.
    failures += [
        f"{right[split]} of {SAMPLES} {split} are right, {count} when recorded"
        for split, count in golden["right"].items()
        if right[split] < count - 1
    ]
    print("over MQTT")
    return failures + ask_over_mqtt(ROBOT / "bundle", folder, golden)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the answers of today")
    if parser.parse_args().record:
        record()
        return 0
    with tempfile.TemporaryDirectory(prefix="edgecascade-demo-") as folder:
        failures = run(Path(folder))
    for failure in failures:
        print(f"FAIL: {failure}", file=sys.stderr)
    if not failures:
        print("PASS")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
