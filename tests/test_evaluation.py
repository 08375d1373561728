# SPDX-License-Identifier: Apache-2.0
"""Evaluation: a bundle is right about its own answers, wrong about others, and near itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import TINY, Build
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from build_engine.pipeline import build as build_bundle
from edgecascade import LLM
from edgecascade.cli import main
from edgecascade.completion import Completion, Timings, Usage
from edgecascade.errors import BundleMismatch, ContextExceeded, InvalidRequest
from edgecascade.evaluation import GREEDY, Evaluation, evaluate
from edgecascade.scoring import contrast, log_softmax, same_json, score, wilson
from edgecascade.suite import Suite, parse_suite
from edgecascade.text.tools import ToolCall

Values = dict[str, Any]
Capture = pytest.CaptureFixture[str]

TOOL = {
    "name": "move",
    "parameters": {
        "type": "object",
        "properties": {"distance": {"type": "number", "maximum": 9}, "gently": {"type": "boolean"}},
        "required": ["distance"],
        "additionalProperties": False,
    },
}
COMMANDS = ["Go to the dock.", "Stop!", "Zwei Meter vor.", "pick up the red box", "¿qué?", "42"]


@pytest.fixture(scope="module")
def llm(build: Build) -> Iterator[LLM]:
    with LLM.load(build("tiny", "speed")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def exact(build: Build) -> Iterator[LLM]:
    with LLM.load(build("tiny", "exact")) as loaded:
        yield loaded


def suite_of(samples: list[Values], max_tokens: int = 24) -> Suite:
    head = {"suite": "own", "format": 1, "splits": {"a": "one", "b": "two"}}
    lines = [head | {"max_tokens": max_tokens}, *samples]
    return parse_suite("\n".join(map(json.dumps, lines)).encode(), "own.jsonl")


def own_samples(llm: LLM) -> list[Values]:
    """Commands with what the bundle itself answers to them."""
    answers = llm.generate(COMMANDS, thinking=False, max_tokens=24, **GREEDY)
    return [
        {
            "id": f"{index}",
            "split": "ab"[index % 2],
            "skill": "talk",
            "prompt": command,
            "thinking": False,
            "expected": {"content": answer.text},
        }
        for index, (command, answer) in enumerate(zip(COMMANDS, answers, strict=True))
    ]


@pytest.fixture(scope="module")
def own(llm: LLM) -> list[Values]:
    return own_samples(llm)


def test_its_own_answers_are_all_right(llm: LLM, own: list[Values]) -> None:
    told: list[tuple[int, int]] = []
    result = evaluate(llm, suite_of(own), progress=lambda *step: told.append(step))
    figures = result.figures()
    assert (figures.exact.count, figures.exact.of, figures.valid) == (6, 6, None)
    assert {result.figures(split).samples for split in "ab"} == {3}
    assert result.tokens_per_s > 0
    assert told == [(step, 12) for step in range(13)]


def test_a_split_without_samples_has_no_figures(llm: LLM, own: list[Values]) -> None:
    result = evaluate(llm, suite_of(own[:1]))
    assert result.splits == ["a"]
    assert list(result.to_dict()["splits"]) == ["a"]


def test_other_answers_are_misses(llm: LLM, own: list[Values]) -> None:
    wrong = [
        sample | {"expected": {"content": sample["expected"]["content"] + "x"}} for sample in own
    ]
    result = evaluate(llm, suite_of([own[0], *wrong[1:4], *own[4:]]))
    assert result.figures().exact.count == 3
    assert [r.answer.score.exact for r in result.results] == [True, *[False] * 3, True, True]
    assert "expected" in result.results[1].answer.score.why


def test_perplexity_is_that_of_the_target_alone(llm: LLM, own: list[Values]) -> None:
    target = "drive 2 m\n</think>\nGoing."
    sample = own[0] | {"thinking": True, "target": target, "expected": {"content": "Going."}}
    figures = evaluate(llm, suite_of([sample])).figures()
    prompt = llm.prompter.from_text(COMMANDS[0], None, raw=False, thinking=True).tokens
    ids = llm.tokenize(target)
    rows = np.array(llm.logits([*prompt, *ids]), np.float64)[len(prompt) - 1 : -1]
    rows = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    nll = -np.log(rows[range(len(ids)), ids]).mean()
    assert figures.target_tokens == len(ids)
    assert figures.perplexity == pytest.approx(math.exp(nll), rel=1e-9)


def test_a_target_is_made_of_the_content_only_where_that_is_the_whole_answer(
    llm: LLM, own: list[Values]
) -> None:
    def tokens(**change: Any) -> int:
        return evaluate(llm, suite_of([own[0] | change])).figures().target_tokens

    said = {"expected": {"content": "Going to the dock."}}
    assert tokens(**said) == len(llm.tokenize("Going to the dock."))
    assert tokens(**said, thinking=True) == 0  # nobody said what it should think
    call = {"tool_calls": [{"name": "move", "arguments": {"distance": 1}}]}
    assert tokens(tools=[TOOL], expected=call) == 0
    assert tokens(expected={"content": ""}) == 0


def test_against_itself_nothing_differs(llm: LLM, own: list[Values]) -> None:
    figures = evaluate(llm, suite_of(own), against=llm).figures()
    assert figures.divergence == 0
    assert figures.agreement is not None
    assert figures.agreement.share == 1
    assert figures.same_answer is not None
    assert figures.same_answer.share == 1
    assert figures.other_exact == figures.exact
    assert figures.other_perplexity == figures.perplexity


def test_int4_is_some_way_from_float(llm: LLM, exact: LLM, own: list[Values]) -> None:
    suite = suite_of([own[0]])
    figures = evaluate(llm, suite, against=exact).figures()
    content = own[0]["expected"]["content"]
    prompt = llm.prompter.from_text(COMMANDS[0], None, raw=False, thinking=False).tokens
    ids = [*prompt, *llm.tokenize(content)]
    mine, theirs = (log_softmax(np.array(m.logits(ids[:-1]))) for m in (llm, exact))
    mine, theirs = mine[len(prompt) - 1 :], theirs[len(prompt) - 1 :]
    expected = (np.exp(theirs) * (theirs - mine)).sum(-1).mean()
    assert figures.divergence == pytest.approx(expected, rel=1e-6)
    assert figures.divergence is not None
    assert figures.divergence > 1e-4
    assert figures.agreement is not None
    assert figures.agreement.of == len(ids) - len(prompt)
    assert figures.other_perplexity != figures.perplexity


def test_without_a_target_bundles_are_compared_along_the_other_s_answer(
    llm: LLM, exact: LLM, own: list[Values]
) -> None:
    suite = suite_of([own[0] | {"thinking": True}])
    result = evaluate(llm, suite, against=exact)
    other = result.results[0].other
    figures = result.figures()
    assert other is not None
    assert figures.perplexity is None
    assert figures.agreement is not None
    assert figures.agreement.of == len(other.completion.token_ids)
    assert figures.divergence is not None
    assert figures.divergence > 0


def test_what_the_other_one_s_context_holds_more_is_left_out(
    build: Build, own: list[Values]
) -> None:
    samples = [one | {"thinking": True} for one in own]
    with (
        LLM.load(build("tiny", "speed"), max_context=48) as short,
        LLM.load(build("tiny", "speed")) as long,
    ):
        result = evaluate(short, suite_of(samples, max_tokens=60), against=long)
    assert all(each.other is not None for each in result.results)


def test_company_changes_nothing(llm: LLM, build: Build, own: list[Values]) -> None:
    def shown(result: Evaluation) -> Values:
        return {key: value for key, value in result.to_dict().items() if "per_s" not in key}

    with LLM.load(build("tiny", "speed"), slots=1, max_queue=1) as alone:
        assert shown(evaluate(alone, suite_of(own))) == shown(evaluate(llm, suite_of(own)))


def test_bundles_that_read_otherwise_are_not_compared(
    llm: LLM, own: list[Values], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY / "checkpoint", checkpoint)
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ 'So: ' }}")
    build_bundle(checkpoint, tmp_path / "other", precision="exact")
    with (
        LLM.load(tmp_path / "other") as other,
        pytest.raises(BundleMismatch, match=r"own\.jsonl:2 as other tokens"),
    ):
        evaluate(llm, suite_of(own), against=other)


def test_what_cannot_be_asked_is_an_error_with_its_line(llm: LLM, own: list[Values]) -> None:
    asked = llm.stats().prefilled_tokens
    long = own[1] | {"prompt": "go " * 5000}
    with pytest.raises(ContextExceeded, match=r"^own\.jsonl:3: the prompt has"):
        evaluate(llm, suite_of([own[0], long]))
    target = own[1] | {"target": "go " * 5000}
    with pytest.raises(ContextExceeded, match=r"^own\.jsonl:3: the prompt with its target has"):
        evaluate(llm, suite_of([own[0], target]))
    assert llm.stats().prefilled_tokens == asked, "it is told before any sample is asked"
    assert llm.stats().running == 0


def test_a_bundle_without_a_tokenizer_is_refused(build: Build, own: list[Values]) -> None:
    with (
        LLM.load(build("moe", "speed")) as bare,
        pytest.raises(InvalidRequest, match=r"own\.jsonl:2: this bundle has no tokenizer"),
    ):
        evaluate(bare, suite_of(own))


def answer(text: str = "", *calls: ToolCall, **changes: Any) -> Completion:
    """A completion, as far as scoring reads it."""
    made = Completion(
        text=text,
        reasoning="",
        tool_calls=calls,
        tool_errors=(),
        token_ids=(1,),
        finish_reason="stop",
        logprobs=None,
        usage=Usage(1, 0, 1, 0),
        timings=Timings(0, 0, 0, 0, 0),
        seed=0,
        bundle_id="",
    )
    return replace(made, **changes)


def move(**arguments: Any) -> ToolCall:
    return ToolCall("move", arguments)


SPLIT = {"id": "1", "split": "a", "skill": "s", "prompt": "?"}
CALLS = SPLIT | {
    "tools": [TOOL, {"name": "stop"}],
    "expected": {
        "content": "Moving.",
        "tool_calls": [
            {"name": "move", "arguments": {"distance": 2, "gently": True}},
            {"name": "stop", "arguments": {}},
        ],
    },
}
SCHEMA = SPLIT | {
    "schema": {"type": "object", "required": ["x"]},
    "expected": {"content": '{"x": 1, "y": [2]}'},
}
MOVED, STOPPED = move(distance=2, gently=True), ToolCall("stop", {})


@pytest.mark.parametrize(
    ("sample", "given", "exact", "valid", "why"),
    [
        (CALLS, answer(" Moving.\n", MOVED, STOPPED), True, True, ""),
        (CALLS, answer("Moving.", move(gently=True, distance=2.0), STOPPED), True, True, ""),
        (CALLS, answer("Moving!", MOVED, STOPPED), False, True, "content is 'Moving!'"),
        (CALLS, answer("Moving.", STOPPED, MOVED), False, True, "call 1 is stop(), expected move"),
        (
            CALLS,
            answer("Moving.", MOVED),
            False,
            True,
            "expected move(distance=2, gently=true) stop()",
        ),
        (CALLS, answer("Moving.", move(distance=2, gently=1), STOPPED), False, False, "gently: 1"),
        (CALLS, answer("Moving.", move(distance=10), STOPPED), False, False, "maximum of 9"),
        (CALLS, answer("Moving.", move(distance=1, up=1), STOPPED), False, False, "unexpected"),
        (CALLS, answer("Moving.", MOVED, tool_errors=("no tool 'fly'",)), False, False, "'fly'"),
        (CALLS, answer("Moving.", MOVED, STOPPED, finish_reason="length"), True, False, "not end"),
        (SCHEMA, answer('{"y":[2.0],"x":1}'), True, True, ""),
        (SCHEMA, answer('{"y":[2],"x":true}'), False, True, "content is"),
        (SCHEMA, answer('{"y":[2]}'), False, False, "'x' is a required property"),
        (SCHEMA, answer("x is 1"), False, False, "is not JSON"),
        (SPLIT | {"expected": {"content": "Hi."}}, answer("Hi. "), True, None, ""),
        (SPLIT | {"expected": {"content": ""}}, answer("Hi."), False, None, "content is 'Hi.'"),
    ],
)
def test_an_answer_is_scored(
    sample: Values, given: Completion, exact: bool, valid: bool | None, why: str
) -> None:
    made = score(suite_of([sample]).samples[0], given)
    assert (made.exact, made.valid) == (exact, valid)
    assert why in made.why
    assert bool(made.why) == bool(why)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (920, 1000, 0.9015, 0.9353)],
)
def test_wilson_s_interval(count: int, of: int, low: float, high: float) -> None:
    assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)


ROWS = array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: st.tuples(*[arrays(np.float32, shape, elements=st.floats(-80, 80, width=32))] * 2)
)


@given(ROWS)
def test_divergence_is_zero_only_for_the_same_distribution(rows: tuple[Any, Any]) -> None:
    one, other = map(log_softmax, rows)
    assert np.exp(one).sum(-1) == pytest.approx(1)
    assert contrast(one, one).divergence == 0
    assert contrast(one, one).agreed == len(one)
    apart = np.abs(np.exp(one) - np.exp(other)).sum(-1)
    # Pinsker: KL is at least half the squared distance.
    assert contrast(one, other).divergence >= (apart**2).sum() / 2 - 1e-9


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_a_value_is_the_same_as_its_copy_and_no_other(value: Any) -> None:
    assert same_json(value, json.loads(json.dumps(value)))
    assert not same_json(value, [value])
    assert not same_json([True, value], [1, value])
    assert same_json({"a": 2, "b": value}, {"b": value, "a": 2.0})


def test_the_command_prints_a_table(
    capsys: Capture, build: Build, own: list[Values], tmp_path: Path
) -> None:
    head = {"suite": "own", "format": 1, "splits": {"a": "1", "b": "2"}, "max_tokens": 24}
    wrong = own[0] | {"id": "wrong", "prompt": "Go\x1b[2J.", "expected": {"content": "no"}}
    suite = tmp_path / "own.jsonl"
    suite.write_text("\n".join(map(json.dumps, [head, *own, wrong])))
    command = ["eval", str(build("tiny", "speed")), "--suite", str(suite)]
    assert main([*command, "--misses", "9"]) == 0
    shown = capsys.readouterr().out
    assert "suite   own, 7 samples" in shown
    assert "85.7 %" in shown
    assert "48.7 - 97.4" in shown
    assert shown.count("expected 'no'") == 1
    assert "\x1b" not in shown
    against = ["--against", str(build("tiny", "exact")), "--split", "a", "--limit", "2"]
    assert main([*command, *against]) == 0
    shown = capsys.readouterr().out
    assert "KL" in shown
    assert "suite    own, 2 samples" in shown
    assert main([*command, *against, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["splits"]["a"]["skills"]["talk"]["samples"] == 2
    assert result["total"]["divergence"] > 0
    assert result["against"]["precision"] == "exact"
    assert [row["exact"] for row in result["answers"]] == [True, True]
    assert main([*command, "--split", "c"]) == 1
    assert "error [suite-invalid]" in capsys.readouterr().err
