# SPDX-License-Identifier: Apache-2.0
"""Tool calls: typed by their schema, alike in any cut, and never half a command."""

from __future__ import annotations

from typing import Any

import pytest
from golden import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import InvalidRequest
from edgecascade.text.stream import TextStream
from edgecascade.text.tokenizer import Tokenizer
from edgecascade.text.tools import (
    ToolCall,
    ToolParser,
    ToolText,
    checked_tools,
    parse_call,
    typed,
)

DRIVE: dict[str, Any] = {
    "name": "drive",
    "description": "Drive somewhere.",
    "parameters": {
        "type": "object",
        "properties": {
            "metres": {"type": "number"},
            "steps": {"type": "integer"},
            "where": {"type": "string"},
            "fast": {"type": "boolean"},
            "path": {"type": "array", "items": {"type": "number"}},
            "pose": {"$ref": "#/$defs/Pose"},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "mode": {"enum": ["slow", "safe"]},
            "gear": {"enum": [1, 2]},
            "label": {"type": ["integer", "string"]},
        },
        "$defs": {"Pose": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
TOOLS = checked_tools([DRIVE, STOP])
SCHEMA = DRIVE["parameters"]


DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"a": DEEP}


def call(name: str, **arguments: str) -> str:
    values = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def read(text: str, sizes: tuple[int, ...] = (1000,)) -> ToolText:
    parser, parts, at, turn = ToolParser(TOOLS), [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        parts.append(parser.push(text[at : at + size]))
        at, turn = at + size, turn + 1
    parts.append(parser.flush())
    return ToolText(
        "".join(part.text for part in parts),
        sum((part.calls for part in parts), ()),
        sum((part.errors for part in parts), ()),
    )


def test_a_call_becomes_a_name_and_typed_arguments() -> None:
    found = read(
        call(
            "drive",
            metres="1.5",
            steps="3",
            where="to the <dock>\nand back",
            fast="True",
            path="[1, 2.5]",
            pose='{"x": 1}',
            limit="null",
            mode="safe",
            gear="2",
            label="7a",
        )
    )
    assert found.errors == ()
    assert found.text == ""
    assert found.calls == (
        ToolCall(
            "drive",
            {
                "metres": 1.5,
                "steps": 3,
                "where": "to the <dock>\nand back",
                "fast": True,
                "path": [1, 2.5],
                "pose": {"x": 1},
                "limit": None,
                "mode": "safe",
                "gear": 2,
                "label": "7a",
            },
        ),
    )


@pytest.mark.parametrize(
    ("value", "schema", "want"),
    [
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        (" -2e3 ", {"type": "number"}, -2000.0),
        ("false", {"type": "boolean"}, False),
        ("007", {"type": "string"}, "007"),
        ("true", {"type": "string"}, "true"),
        ("12", None, "12"),
        ("12", {}, "12"),
        ("12", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 12),
        ("None", {"type": ["null", "integer"]}, None),
        ("3", {"const": 3}, 3),
        ("x", {"$ref": "#/nowhere"}, "x"),
        ("x", {"$ref": "#/loop"}, "x"),
        ("7", {"anyOf": [{"$ref": "#/wide"}] * 50}, 7),  # followed once, not 50 times 50 times
        ("x", {"type": 5, "anyOf": None, "enum": 5}, "x"),
        ("x", {"type": [["integer"]], "oneOf": {"type": "integer"}}, "x"),
        ("9" * 400, {"type": "integer"}, int("9" * 400)),
    ],
)
def test_a_value_takes_the_type_of_its_schema(value: str, schema: Any, want: Any) -> None:
    wide = {"anyOf": [{"$ref": "#/wide"}] * 50, "type": "integer"}
    root = {"loop": {"$ref": "#/loop"}, "wide": wide}
    result = typed(value, schema, root)
    assert result == want
    assert type(result) is type(want)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("far", {"type": "number"}),
        ("NaN", {"type": "number"}),
        ("Infinity", {"type": "number"}),
        ("1e999", {"type": "number"}),
        ("[1e999]", {"type": "array"}),
        ("[" * 100_000, {"type": "array"}),
        ("true", {"type": "integer"}),
        ("1.5", {"type": "integer"}),
        ("1", {"type": "boolean"}),
        ("[1", {"type": "array"}),
        ("[]", {"type": "object"}),
    ],
)
def test_a_value_of_another_type_is_refused(value: str, schema: Any) -> None:
    with pytest.raises(ValueError, match=schema["type"]):
        typed(value, schema, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (call("fly"), "there is no tool 'fly', only 'drive', 'stop'"),
        (call("drive", metres="far"), "parameter 'metres' of 'drive': 'far' is not number"),
        ("<tool_call>\n<function=stop>\n</tool_call>", "not closed by </function>"),
        ("<tool_call>\nstop()\n</tool_call>", "stands where <function=...> should"),
        (
            "<tool_call><function=drive><parameter=steps>1</function></tool_call>",
            "not closed by </parameter>",
        ),
        (
            "<tool_call><function=drive><parameter=steps>1</parameter>"
            "<parameter=steps>2</parameter></function></tool_call>",
            "given twice",
        ),
        ("<tool_call>\n<function=drive>\n<parameter=steps>\n5", "not closed by </function>"),
    ],
)
def test_a_call_that_makes_no_sense_stays_text_with_a_note(text: str, words: str) -> None:
    found = read("Well: " + text)
    assert found.calls == ()
    assert found.text.replace("Well:", "").strip() == text.strip()
    assert len(found.errors) == 1
    assert words in found.errors[0]


def test_a_missing_required_parameter_is_a_broken_call() -> None:
    tool = {**DRIVE, "parameters": {**SCHEMA, "required": ["metres"]}}
    with pytest.raises(ValueError, match="'drive' lacks its parameter 'metres'"):
        parse_call("<function=drive></function>", checked_tools([tool]))


def test_text_and_several_calls_come_apart() -> None:
    found = read(f"On my way.\n\n{call('drive', steps='1')}\n{call('stop')}\n")
    assert found.text == "On my way."
    assert [c.name for c in found.calls] == ["drive", "stop"]


def test_text_before_a_call_streams_and_the_mark_never_shows() -> None:
    parser = ToolParser(TOOLS)
    assert parser.push("Going ").text == "Going"
    assert parser.push("now. <tool").text == " now."
    assert parser.push("_call>").text == ""
    rest = parser.push("<function=stop></function></tool_call>")
    assert (rest.text, rest.calls) == ("", (ToolCall("stop", {}),))


def test_a_call_that_lacks_only_its_last_mark_counts() -> None:
    text = call("stop").removesuffix("</tool_call>")
    assert read(text).calls == (ToolCall("stop", {}),)


PIECES = st.sampled_from(
    [
        "go ",
        "\n",
        "<tool_call>",
        "</tool_call>",
        "<function=stop>",
        "<function=drive>",
        "</function>",
        "<parameter=steps>",
        "1",
        "</parameter>",
        "<",
        "tool_call>",
        call("stop"),
        call("drive", metres="2"),
    ]
)


@settings(max_examples=500)
@given(
    text=st.lists(PIECES, max_size=12).map("".join),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple),
)
def test_any_cut_of_any_text_reads_alike(text: str, sizes: tuple[int, ...]) -> None:
    assert read(text, sizes) == read(text)


@settings(max_examples=300)
@given(
    where=st.text(alphabet=st.characters(exclude_characters="<"), max_size=40),
    metres=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(-(10**6), 10**6),
)
def test_arguments_come_back_as_they_were_written(where: str, metres: float, steps: int) -> None:
    found = read(call("drive", where=where, metres=repr(metres), steps=str(steps)))
    assert found.calls == (ToolCall("drive", {"where": where, "metres": metres, "steps": steps}),)


def test_a_call_is_read_from_tokens() -> None:
    tokenizer = Tokenizer(TINY / "checkpoint" / "tokenizer.json")
    stream = TextStream(tokenizer, opened=True, tools=TOOLS)
    tokens = tokenizer.encode("I should halt.\n</think>\nHalting.\n" + call("stop") + "\n")
    parts = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(part.reasoning for part in parts) == "I should halt."
    assert "".join(part.text for part in parts) == "Halting."
    assert [c for part in parts for c in part.tool_calls] == [ToolCall("stop", {})]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        (5, "tools is int; it must be a list"),
        (["drive"], r"tools\[0\] is str"),
        ([{"type": "function"}], r"tools\[0\] has no function with a name"),
        ([{"name": ""}], r"tools\[0\] has no function with a name"),
        ([STOP, {"name": "stop"}], r"tools\[1\] repeats the name 'stop'"),
        ([{"name": "a", "parameters": [1]}], "must be a JSON schema"),
        ([{"name": "a", "parameters": {"properties": []}}], "properties of 'a' must be a dict"),
        ([{"name": "a", "parameters": {"properties": None}}], "properties of 'a' must be a dict"),
        ([{"name": "a", "parameters": {"required": 5}}], "required of 'a' must be a list of names"),
        ([{"name": "a", "x": object()}], "plain JSON values"),
        ([{"name": "a", "x": DEEP}], "plain JSON values"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused(tools: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        checked_tools(tools)
