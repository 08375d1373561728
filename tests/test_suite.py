# SPDX-License-Identifier: Apache-2.0
"""Suites are read strictly: what is not as the format says is an error with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.errors import SuiteError
from edgecascade.suite import find_suite, parse_suite, problem, read_suite
from edgecascade.text.tools import ToolCall

ROOT = Path(__file__).resolve().parent.parent
Values = dict[str, Any]

MOVE = {
    "name": "move",
    "parameters": {
        "type": "object",
        "properties": {
            "distance": {"type": "number", "minimum": 0},
            "direction": {"enum": ["forward", "backward"]},
        },
        "required": ["distance"],
        "additionalProperties": False,
    },
}


def header() -> Values:
    return {
        "suite": "small",
        "format": 1,
        "splits": {"seen": "as in training", "other": "new"},
        "tools": {"robot": [MOVE]},
        "max_tokens": 40,
    }


def sample() -> Values:
    return {
        "id": "s1",
        "split": "seen",
        "skill": "move",
        "messages": [{"role": "user", "content": "Two metres ahead."}],
        "tools": "robot",
        "thinking": True,
        "expected": {"tool_calls": [{"name": "move", "arguments": {"distance": 2}}]},
        "target": "move 2</think>\n",
    }


def data(*values: Values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def test_a_suite_is_read() -> None:
    plain = {"id": "s2", "split": "other", "skill": "talk", "prompt": "Hi.",
             "expected": {"content": "Hello."}}  # fmt: skip
    bare = plain | {"id": "s3", "raw": True}
    suite = parse_suite(data(header(), sample(), plain, bare), "small.jsonl")
    assert (suite.name, suite.max_tokens, len(suite.samples)) == ("small", 40, 3)
    first, second, third = suite.samples
    assert first.calls == (ToolCall("move", {"distance": 2}),)
    assert first.tools[0]["function"]["name"] == "move"
    assert (first.line, first.thinking, first.content) == (2, True, "")
    assert second.messages == ({"role": "user", "content": "Hi."},)
    assert (second.content, second.thinking, second.raw) == ("Hello.", None, None)
    assert (third.messages, third.raw) == ((), "Hi.")


def test_the_example_of_the_docs_is_a_suite() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    example = page.split("```json\n")[1].split("```")[0]
    assert len(parse_suite(example.encode(), "evaluation.md").samples) == 2


def test_a_part_takes_samples_evenly_from_the_splits_asked_for() -> None:
    samples = [sample() | {"id": f"{n}", "split": "seen" if n < 10 else "other"} for n in range(14)]
    suite = parse_suite(data(header(), *samples), "small.jsonl")
    assert [s.id for s in suite.part(limit=5).samples] == [*"02468", "10", "11", "12", "13"]
    part = suite.part(["other"], 2)
    assert [s.id for s in part.samples] == ["10", "12"]
    assert list(part.splits) == ["other"]
    assert part.sha256 == suite.sha256
    with pytest.raises(SuiteError, match="has no split 'new'; it has seen, other"):
        suite.part(["new"])


def drop(key: str) -> Callable[[Values], None]:
    return lambda value: value.pop(key)


def put(key: str, what: Any) -> Callable[[Values], None]:
    return lambda value: value.update({key: what})


CALL = {"name": "move", "arguments": {"distance": 2}}
USER = {"role": "user", "content": "Go."}


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (1, drop("format"), "format is missing"),
        (1, put("format", 2), "format is 2; this version reads 1"),
        (1, put("format", True), "format is True"),
        (1, put("suite", ""), "suite is ''; it must be a string that is not empty"),
        (1, put("description", 3), "description is 3"),
        (1, put("author", "me"), "'author' is unknown; there are suite, format"),
        (1, put("splits", []), "splits must be an object of names"),
        (1, put("splits", {"seen": 3}), "splits must be an object of names"),
        (1, put("max_tokens", 0), "max_tokens is 0"),
        (1, put("max_tokens", 2.5), "max_tokens is 2.5"),
        (1, put("tools", [MOVE]), "tools is [{"),
        (1, put("tools", {"robot": [{"description": "no name"}]}), "no function with a name"),
        (1, put("tools", {"robot": [{"name": "a", "parameters": {"type": "robot"}}]}),
         "parameters of 'a' is no JSON schema"),
        (2, drop("id"), "id is missing"),
        (2, put("tool", "robot"), "'tool' is unknown"),
        (2, put("split", "new"), "split is 'new'; the header names seen, other"),
        (2, put("skill", 3), "skill is 3"),
        (2, put("thinking", "on"), "thinking is 'on'; it must be true or false"),
        (2, put("prompt", "Go."), "either messages or a prompt"),
        (2, drop("messages"), "either messages or a prompt"),
        (2, put("raw", True), "raw goes with a prompt"),
        (2, put("raw", "yes"), "raw is 'yes'"),
        (2, put("messages", []), "messages is empty"),
        (2, put("messages", [{"role": "robot", "content": ""}]), "has role 'robot'"),
        (2, put("messages", [USER, {"role": "assistant", "content": "Yes."}]),
         "the last message is the assistant's"),
        (2, put("tools", "arm"), "tools is 'arm'; the header names robot"),
        (2, put("tools", 3), "tools is int"),
        (2, put("schema", {"type": "robot"}), "schema is no JSON schema"),
        (2, put("schema", "object"), "schema is 'object'"),
        (2, put("schema", {"type": "object"}), "expected content does not conform to the schema"),
        (2, put("expected", {}), "expected is {}"),
        (2, put("expected", {"calls": []}), "expected 'calls' is unknown"),
        (2, put("expected", {"content": 3}), "expected content is int"),
        (2, put("expected", {"content": "\ud800"}), "lone surrogate"),
        (2, put("expected", {"tool_calls": CALL}), "expected tool_calls is {"),
        (2, put("expected", {"tool_calls": ["move"]}), "expected tool_calls holds 'move'"),
        (2, put("expected", {"tool_calls": [{"name": "move"}]}), "arguments is missing"),
        (2, put("expected", {"tool_calls": [CALL | {"name": "fly"}]}), "expected calls 'fly'"),
        (2, put("expected", {"tool_calls": [CALL | {"arguments": 2}]}), "must be an object"),
        (2, put("expected", {"tool_calls": [CALL | {"arguments": {}}]}),
         "'distance' is a required property"),
        (2, put("expected", {"tool_calls": [CALL | {"arguments": {"distance": -1}}]}),
         "distance: -1 is less than the minimum of 0"),
        (2, put("target", ""), "target is ''"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(line: int, change: Callable[[Values], None], words: str) -> None:
    lines = [header(), sample()]
    change(lines[line - 1])
    with pytest.raises(SuiteError) as raised:
        parse_suite(data(*lines), "small.jsonl")
    assert str(raised.value).startswith(f"small.jsonl:{line}: ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "small.jsonl has 0 lines"),
        (data(header()), "small.jsonl has 1 lines"),
        (data(header()) + b"\n" + data(sample()), "small.jsonl:2: the line is empty"),
        (data(header()) + b'{"id": "\xff"}', "small.jsonl:2: not JSON: 'utf-8' codec"),
        (data(header()) + b'{"id": NaN}', "small.jsonl:2: not JSON: NaN"),
        (data(header()) + b"[1]", "small.jsonl:2: [1] is not an object"),
        (data(header()) + b'{"id": "a", "id": "b"}', "small.jsonl:2: not JSON: key 'id'"),
        (data(header()) + b"[" * 10**5, "small.jsonl:2: not JSON: it is nested too deep"),
        (data(header(), sample(), sample()), "small.jsonl:3: id 's1' is that of line 2"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(SuiteError) as raised:
        parse_suite(content, "small.jsonl")
    assert str(raised.value).startswith(words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_suite_or_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(SuiteError):
        parse_suite(content, "any")


@given(
    st.sampled_from([1, 2]),
    st.sampled_from(sorted(header().keys() | sample().keys() | {"schema", "prompt", "raw"})),
    JSON,
)
def test_any_value_of_any_key_is_read_or_refused_with_its_line(
    line: int, key: str, value: Any
) -> None:
    lines = [header(), sample()]
    lines[line - 1][key] = value
    try:
        read = f"any:{parse_suite(data(*lines), 'any').samples[0].line}: "
    except SuiteError as error:
        read = str(error)
    assert read.startswith(("any:1: ", "any:2: "))


def test_a_schema_with_a_reference_that_leads_nowhere_is_a_fault_not_a_download() -> None:
    fault = problem({"a": 1}, {"$ref": "http://127.0.0.1:9/none.json"})
    assert fault is not None
    assert "cannot be followed" in fault


def test_a_name_is_looked_up_beside_the_bundle_then_in_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "mine.jsonl").write_bytes(data(header(), sample()))
    assert find_suite("mine", [tmp_path / "bundle"]) == folder / "mine.jsonl"
    assert find_suite("mine", ["elsewhere", tmp_path / "bundle"]) == folder / "mine.jsonl"
    assert find_suite("a/b") == Path("a/b")
    assert read_suite(folder / "mine.jsonl").file == str(folder / "mine.jsonl")
    with pytest.raises(SuiteError, match=r"no suite 'yours' in .*; give a path, or one of .*mine"):
        find_suite("yours", [tmp_path / "bundle"])


@pytest.mark.parametrize("path", ["no-such-file.jsonl", ".", "a\0b.jsonl"])
def test_a_file_that_cannot_be_read_is_an_error_of_ours(path: str) -> None:
    with pytest.raises(SuiteError, match="cannot read the suite"):
        read_suite(path)
