# SPDX-License-Identifier: Apache-2.0
"""The trained model in the box: it is what its checkpoint makes, and acts only when told to."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.pipeline import build
from edgecascade import LLM
from edgecascade.cli import main
from edgecascade.files import sha256_file
from edgecascade.suite import find_suite, read_suite

ROOT = TINY.parents[1]
ROBOT = ROOT / "examples" / "demo_model"
TOOLS: list[dict[str, Any]] = json.loads((ROBOT / "tools.json").read_text())
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def robot() -> Iterator[LLM]:
    with LLM.load(ROBOT / "bundle") as llm:
        yield llm


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_bundle_is_what_the_checkpoint_makes(tmp_path: Path) -> None:
    build(ROBOT / "checkpoint", tmp_path / "bundle", precision="speed")
    files = sorted(file.name for file in (tmp_path / "bundle").iterdir())
    assert files == sorted(file.name for file in (ROBOT / "bundle").iterdir())
    for name in files:
        if name not in ("manifest.json", "report.json"):  # they hold versions and times
            assert sha256_file(tmp_path / "bundle" / name) == sha256_file(ROBOT / "bundle" / name)


def test_it_is_small() -> None:
    assert size(ROBOT / "bundle") <= 8e6
    assert size(ROBOT / "checkpoint") <= 20e6


def test_its_tools_are_those_of_the_suite() -> None:
    suite = read_suite(find_suite("robot"))
    assert {json.dumps(sample.tools) for sample in suite.samples} == {json.dumps(TOOLS)}


def consoles() -> list[tuple[str, str]]:
    """The README's commands on the bundle, each with what it shows."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    shown = [part for block in blocks for part in block.split("$ ")[1:]]
    commands = [re.split(r"(?<!\\)\n", part, maxsplit=1) for part in shown]
    return [(cmd, out) for cmd, out in commands if cmd.startswith("edgecascade generate")]


@pytest.mark.parametrize(("command", "shown"), consoles())
def test_the_readme_shows_what_it_answers(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    out, err = capsys.readouterr()
    thoughts = "".join(line for line in err.splitlines(True) if not line.startswith("["))
    assert thoughts + out == "".join(
        line for line in shown.splitlines(True) if not line.startswith("[")
    )


def test_the_readme_shows_a_command() -> None:
    assert consoles()


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "asdf qwer zxcv",
        "!!!???",
        "12345 67890",
        "Was gibt es heute zu essen?",
        "Quelle heure est-il à Paris ?",
        "今日はいい天気ですね",
        "Write me a poem about the sea.",
        "What is the capital of France?",
        "lorem ipsum dolor sit amet " * 20,
    ],
)
def test_what_is_no_command_moves_nothing(robot: LLM, text: str, thinking: bool) -> None:
    answer = robot.generate(text, tools=TOOLS, thinking=thinking)
    assert (answer.tool_calls, answer.finish_reason) == ((), "stop")
    assert answer.text.strip()


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=300), st.booleans())
def test_any_text_is_answered(robot: LLM, text: str, thinking: bool) -> None:
    answer = robot.generate(text, tools=TOOLS, thinking=thinking, max_tokens=200)
    assert answer.usage.completion_tokens > 0


def test_two_thousand_words_are_answered(robot: LLM) -> None:
    words = (ROOT / "docs" / "mqtt.md").read_text().split()
    answer = robot.generate(" ".join((words * 3)[:2000]), tools=TOOLS, max_tokens=200)
    assert answer.finish_reason == "stop"


def test_a_result_is_answered_and_the_talk_goes_on(robot: LLM) -> None:
    chat = robot.session(tools=TOOLS)
    first = chat.generate("Drive forward two metres.")
    assert [str(call) for call in first.tool_calls] == ['move(direction="forward", distance=2)']
    done = chat.generate([{"role": "tool", "content": '{"status": "ok"}'}])
    assert (done.text, done.tool_calls) == ("Done.", ())
    last = chat.generate("Now turn left by 90 degrees.", thinking=False)
    assert [str(call) for call in last.tool_calls] == ['turn(direction="left", angle=90)']
