# SPDX-License-Identifier: Apache-2.0
"""Messages to a prompt: the bundle's own Jinja chat template in a sandbox, or the family's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgecascade.errors import BundleError, InvalidRequest
from edgecascade.text.fallback import NEMOTRON_TEMPLATE
from edgecascade.text.tokenizer import checked_text

ROLES = ("system", "user", "assistant", "tool")
KEYS = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}


class ChatTemplate:
    """A compiled chat template. It sees what transformers shows it and nothing else."""

    def __init__(self, source: str | None, tokens: Mapping[str, str | None]) -> None:
        # Imported here: token ids in, token ids out needs no templates.
        from edgecascade.text.sandbox import compiled

        try:
            self._template = compiled(source or NEMOTRON_TEMPLATE, "chat_template.jinja")
        except ValueError as error:
            raise BundleError(f"{error}; copy the checkpoint's template and build again") from error
        self._tokens = {name: text for name, text in tokens.items() if text is not None}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        answer: bool = True,
    ) -> str:
        """The prompt; `answer` opens the assistant's turn.

        Raises:
            InvalidRequest: when the template refuses the messages.
        """
        from edgecascade.text.sandbox import FAILURES, TemplateRefusal

        context: dict[str, Any] = {
            "messages": messages,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": answer,
            **self._tokens,
        }
        if thinking is not None:  # else the template's own default
            context["enable_thinking"] = thinking
        try:
            text = self._template.render(context)
        except TemplateRefusal as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        except FAILURES as error:
            why = str(error) or type(error).__name__
            raise InvalidRequest(f"the chat template fails on these messages: {why}") from error
        # A tool or a call may hold what messages may not.
        return checked_text(text, "what the chat template makes of these messages")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with valid roles, plain text and tool arguments as dicts.

    Raises:
        InvalidRequest: naming the message and what is wrong with it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            f"messages is {type(messages).__name__}; it must be a list of dicts with role, content"
        )
    if not messages:
        raise InvalidRequest("messages is empty; give at least one user message")
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} is {type(message).__name__}; it must be a dict")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where} has role {role!r}; it must be one of {', '.join(ROLES)}")
    unknown = [key for key in message if key not in KEYS and message[key] is not None]
    if unknown:
        raise InvalidRequest(
            f"{where} has {unknown[0]!r}; a message holds {', '.join(sorted(KEYS))}"
        )
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise InvalidRequest(f"{where} has tool_calls but role {role!r}; only assistants call")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["content"] = _content(message.get("content"), where, optional=role == "assistant")
    for key in ("name", "tool_call_id"):
        if key in checked:
            checked[key] = checked_text(checked[key], f"{where}.{key}")
    if "reasoning_content" in checked:
        checked["reasoning_content"] = checked_text(
            checked["reasoning_content"], f"{where}.reasoning_content"
        )
    if calls:
        checked["tool_calls"] = _checked_calls(calls, where)
    return checked


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str | bytes):
        return checked_text(content, f"{where}.content")
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(checked_text(part.get("text"), f"{where}.content") for part in content)
    raise InvalidRequest(
        f"{where} has content of type {type(content).__name__}; it must be a string, or a list of "
        '{"type": "text", "text": ...}'
    )


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise InvalidRequest(f"{where}.tool_calls is {type(calls).__name__}; it must be a list")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise InvalidRequest(f"{where}.tool_calls[{index}] has no function with a name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):  # as OpenAI's API sends them
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    f"{where}.tool_calls[{index}].arguments is not JSON: {error}"
                ) from error
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(f"{where}.tool_calls[{index}].arguments must be a JSON object")
        try:
            json.dumps(dict(arguments), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{where}.tool_calls[{index}].arguments must be plain JSON values: {error}"
            ) from error
        checked.append(
            {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        )
    return checked
