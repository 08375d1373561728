# SPDX-License-Identifier: Apache-2.0
"""Messages to prompts: the family's format, the checkpoint's template, and what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import TINY

from edgecascade.errors import BundleError, InvalidRequest
from edgecascade.text.prompt import Prompter
from edgecascade.text.template import ChatTemplate, checked_messages
from edgecascade.text.tokenizer import Tokenizer, checked_text

TOKENIZER_FILE = TINY / "checkpoint" / "tokenizer.json"
OWN = (TINY / "checkpoint" / "chat_template.jinja").read_text()
FAMILY = ChatTemplate(None, {})
USER = {"role": "user", "content": "Go."}
CALL = {"function": {"name": "drive", "arguments": '{"metres": 1.5, "path": ["a", "<b>"]}'}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "drive",
        "description": "Drive & stop.",
        "parameters": {
            "type": "object",
            "properties": {
                "metres": {"type": "number", "description": "How far", "minimum": 0},
                "gait": {"type": "string", "enum": ["walk", "run"]},
            },
            "required": ["metres"],
        },
    },
}


def render(messages: list[Any], template: ChatTemplate = FAMILY, **options: Any) -> str:
    return template.render(checked_messages(messages), **options)


def test_a_system_block_is_always_there_and_thinking_is_open() -> None:
    assert render([USER]) == (
        "<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\nGo.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_thinking_off_closes_the_block_without_a_line_break() -> None:
    assert render([USER], thinking=False).endswith("<|im_start|>assistant\n<think></think>")


def test_without_an_answer_the_prompt_ends_with_the_turn() -> None:
    assert render([USER]).startswith(render([USER], answer=False))
    assert render([USER], answer=False).endswith("Go.<|im_end|>\n")


def test_old_reasoning_is_dropped_and_that_of_a_tool_loop_kept() -> None:
    text = render(
        [
            {"role": "system", "content": "S"},
            USER,
            {"role": "assistant", "content": "A", "reasoning_content": "old"},
            {"role": "user", "content": "More."},
            {"role": "assistant", "reasoning_content": "new", "tool_calls": [CALL]},
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": "two"},
        ]
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nGo.<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>A<|im_end|>\n"
        "<|im_start|>user\nMore.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nnew\n</think>\n"
        "<tool_call>\n<function=drive>\n<parameter=metres>\n1.5\n</parameter>\n"
        '<parameter=path>\n["a", "<b>"]\n</parameter>\n</function>\n</tool_call>\n<|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_reasoning_inside_the_content_is_found() -> None:
    old = {"role": "assistant", "content": "<think>\nhm\n</think>\nA"}
    assert "<think></think>A<|im_end|>" in render([USER, old, USER])
    assert "<think>\nhm\n</think>\nA<|im_end|>" in render([USER, old])


def test_tools_stand_in_the_system_block() -> None:
    text = render([{"role": "system", "content": "S"}, USER], tools=[TOOL])
    assert text.startswith(
        "<|im_start|>system\nS\n\n# Tools\n\nYou have access to the following functions:\n\n"
        "<tools>\n<function>\n<name>drive</name>\n<description>Drive & stop.</description>\n"
        "<parameters>\n<parameter>\n<name>metres</name>\n<type>number</type>\n"
        "<description>How far</description>\n<minimum>0</minimum>\n</parameter>\n"
        "<parameter>\n<name>gait</name>\n<type>string</type>\n"
        '<enum>["walk", "run"]</enum>\n</parameter>\n</parameters>\n'
        '<required>["metres"]</required>\n</function>\n</tools>\n\n'
    )


def test_the_checkpoints_own_template_says_the_same_of_plain_turns() -> None:
    own = ChatTemplate(OWN, {})
    messages = [USER, {"role": "assistant", "content": "A"}, USER]
    for thinking in (None, True, False):
        assert render(messages, own, thinking=thinking) == render(messages, thinking=thinking)


def test_a_template_runs_in_a_sandbox() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(InvalidRequest, match="the chat template fails"):
            render([USER], ChatTemplate(source, {}))


def test_a_template_may_refuse_and_its_words_arrive() -> None:
    strict = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="refuses these messages: roles must alternate"):
        render([USER], strict)


def test_a_template_sees_what_transformers_shows_it() -> None:
    source = "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert render([{"role": "user", "content": "ü<"}], template) == (
        '<s>[{"role": "user", "content": "ü<"}]4'
    )
    by_place = ChatTemplate("{{ messages[0].content | tojson(true) }}", {})
    assert render([{"role": "user", "content": "ü"}], by_place) == '"\\u00fc"'


def test_marks_for_training_change_nothing() -> None:
    """As in transformers, where they open a scope of their own, too."""
    source = (
        "{% for m in messages %}{% set said = m.content %}{% generation %}{{ said }}"
        "{% set said = 'x' %}{% endgeneration %}{{ said }}.{% endfor %}"
    )
    assert render([USER, USER], ChatTemplate(source, {})) == render(
        [USER, USER],
        ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.content }}.{% endfor %}", {}),
    )


def test_a_template_that_cannot_be_compiled_is_the_bundles_fault() -> None:
    with pytest.raises(BundleError, match="cannot be compiled"):
        ChatTemplate("{{ 2 ** 100000 }}", {})


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ [][1] + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_fails_is_told(template: str) -> None:
    with pytest.raises(InvalidRequest, match=r"the chat template fails on these messages: ."):
        render([USER], ChatTemplate(template, {}))


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([USER], [{"type": "function", "function": {"name": "f\ud800"}}]),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "a\ud800"}]}, USER], []),
    ],
)
def test_text_without_a_utf8_form_is_found_wherever_it_hides(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    with pytest.raises(InvalidRequest, match=r"lone surrogate U\+D800"):
        render(messages, tools=tools)


def test_a_template_that_is_no_template_names_its_line() -> None:
    with pytest.raises(BundleError, match=r"chat_template.jinja, line 2: .*endfor"):
        ChatTemplate("a\n{% endfor %}", {})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages is str"),
        ({"role": "user"}, "messages is dict"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] is str"),
        ([{"content": "x"}], r"messages\[0\] has role None"),
        ([USER, {"role": "robot", "content": "x"}], r"messages\[1\] has role 'robot'"),
        ([{"role": "user"}], r"messages\[0\] has content of type NoneType"),
        ([{"role": "user", "content": 5}], r"messages\[0\] has content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has content of type list"),
        ([{"role": "user", "content": "x", "mood": "good"}], r"messages\[0\] has 'mood'"),
        ([{"role": "user", "content": "\ud800"}], r"lone surrogate U\+D800 at character 0"),
        ([{"role": "user", "content": b"a\xff"}], "byte 0xff at offset 1"),
        ([{**USER, "tool_calls": [CALL]}], "tool_calls but role 'user'"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls is str"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] has no function"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}],
            r"tool_calls\[0\].arguments is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "[" * 10**5}]}],
            r"tool_calls\[0\].arguments is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "[1]"}]}],
            r"tool_calls\[0\].arguments must be a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"x": math.nan}}]}],
            r"tool_calls\[0\].arguments must be plain JSON values",
        ),
        ([{**USER, "name": object()}], r"messages\[0\].name is object"),
        ([{"role": "tool", "content": "x", "tool_call_id": 5}], "tool_call_id is int"),
    ],
)
def test_messages_that_make_no_sense_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        checked_messages(messages)


def test_parts_of_text_are_joined_and_empty_keys_ignored() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_messages([{"role": "user", "content": parts, "name": None}]) == [
        {"role": "user", "content": "ab"}
    ]


def prompter(template: str | None, tokenizer: Path | None = TOKENIZER_FILE) -> Prompter:
    return Prompter(tokenizer, template, {"bos_token_id": 1, "eos_token_id": [2, 11]})


def test_a_prompt_knows_whether_it_opens_reasoning() -> None:
    ours = prompter(OWN)
    prompt = ours.from_messages([USER], None, thinking=None)
    same = ours.from_text("Go.", None, raw=False, thinking=None)
    assert prompt.tokens.tolist() == same.tokens.tolist()
    assert (prompt.messages, same.messages) == ((USER,), ()), "a text is no conversation"
    assert prompt.reasoning
    assert prompt.chat
    assert not ours.from_text("Go.", None, raw=False, thinking=False).reasoning
    assert ours.from_tokens(prompt.tokens, None).reasoning


def test_the_history_is_what_every_next_prompt_begins_with() -> None:
    ours = prompter(OWN)
    answered = [USER, {"role": "assistant", "content": "Gone.", "reasoning_content": "Hm."}]
    history = ours.history(answered, None)
    shown = Tokenizer(TOKENIZER_FILE).decode(history.tolist(), skip_special=False)
    assert shown.endswith("<think></think>Gone.<|im_end|>\n<|im_start|>user\n")
    for text in ("On.", "Stop!", "Hm?", "7"):
        after = ours.from_messages([*answered, {**USER, "content": text}], None, thinking=None)
        assert after.tokens[: len(history)].tolist() == history.tolist()


def test_raw_text_stays_as_it_is() -> None:
    prompt = prompter(OWN).from_text("Go.", None, raw=True, thinking=None)
    assert prompt.tokens.tolist() == Tokenizer(TOKENIZER_FILE).encode("Go.")
    assert (prompt.chat, prompt.reasoning) == (False, False)


def test_text_without_a_chat_template_is_continued_and_messages_use_the_familys() -> None:
    ours = prompter(None)
    assert not ours.from_text("Go.", None, raw=False, thinking=None).chat
    assert ours.from_messages([USER], None, thinking=None).chat


def test_a_tokenizer_without_the_familys_marks_has_no_chat(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    Fast(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="no chat template and its tokenizer lacks"):
        prompter(None, tmp_path / "tokenizer.json").from_messages([USER], None, thinking=None)


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    ours = prompter(None, None)
    assert ours.from_tokens(np.array([1, 2], np.int32), None).tokens.tolist() == [1, 2]
    with pytest.raises(InvalidRequest, match=r"no tokenizer\.json; give token ids"):
        ours.from_text("a", None, raw=True, thinking=None)


def test_a_tokenizer_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    copy = folder / "tokenizer.json"
    copy.write_bytes(TOKENIZER_FILE.read_bytes())
    assert Tokenizer(copy).encode("Go.") == Tokenizer(TOKENIZER_FILE).encode("Go.")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    for content in (b"{", b"{}", b"[1]", b"\xff"):
        broken.write_bytes(content)
        with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
            Tokenizer(broken)


def test_text_must_have_a_utf8_form() -> None:
    assert checked_text("ü".encode(), "prompt") == "ü"
    with pytest.raises(InvalidRequest, match="prompt is not UTF-8: byte 0xc3 at offset 0"):
        checked_text(b"\xc3", "prompt")
    with pytest.raises(InvalidRequest, match=r"lone surrogate U\+DC80 at character 2"):
        checked_text("ab\udc80", "prompt")
