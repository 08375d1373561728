# SPDX-License-Identifier: Apache-2.0
"""Requests to prompts: what the model reads, and what that says about its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import InvalidRequest
from edgecascade.text.reasoning import opens_reasoning
from edgecascade.text.template import ChatTemplate, checked_messages
from edgecascade.text.tokenizer import Tokenizer, checked_text
from edgecascade.text.tools import checked_tools
from edgecascade.text.turns import TurnEncoder, common_length

Array = NDArray[np.int32]
TURN_MARKS = ("<|im_start|>", "<|im_end|>")  # of the family's own chat format
TAIL_TOKENS = 8  # of a prompt given as ids, enough to see whether it opens the reasoning


@dataclass(frozen=True, eq=False)
class Prompt:
    """int32 token ids; whether the answer begins as reasoning; the tools it may call.

    `chat` says that it went through the chat template, `messages` of which conversation.
    """

    tokens: Array
    reasoning: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    chat: bool = False
    messages: tuple[dict[str, Any], ...] = ()


class Prompter:
    """A bundle's tokenizer and chat template at work."""

    def __init__(
        self, tokenizer: Path | bytes | None, template: str | None, generation: Mapping[str, Any]
    ) -> None:
        self.tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._turns = TurnEncoder(self.tokenizer, TURN_MARKS[1]) if self.tokenizer else None
        self._source = template
        self._generation = generation
        self._template: ChatTemplate | None = None

    def from_tokens(self, tokens: Array, tools: Any) -> Prompt:
        """Token ids as they are."""
        tools = tuple(checked_tools(tools))
        if self.tokenizer is None:
            return Prompt(tokens)
        tail = self.tokenizer.decode(tokens[-TAIL_TOKENS:].tolist(), skip_special=False)
        return Prompt(tokens, opens_reasoning(tail), tools)

    def from_text(
        self, text: str | bytes, tools: Any, *, raw: bool, thinking: bool | None
    ) -> Prompt:
        """One user message where the bundle has a chat template, else the text to be continued."""
        text = checked_text(text, "prompt")
        if not text:
            raise InvalidRequest("prompt is empty; give at least one character")
        if self._source is not None and not raw:
            message = {"role": "user", "content": text}
            asked = self.from_messages([message], tools, thinking=thinking)
            return replace(asked, messages=())  # nobody goes on with it
        ids = self.needed_tokenizer().encode(text, add_special_tokens=True)
        tokens = np.array(ids, np.int32)
        return Prompt(tokens, opens_reasoning(text), tuple(checked_tools(tools)))

    def from_messages(self, messages: Any, tools: Any, *, thinking: bool | None) -> Prompt:
        """A conversation through the chat template."""
        self.needed_tokenizer()
        messages, tools = checked_messages(messages), checked_tools(tools)
        text = self._chat_template().render(messages, tools=tools, thinking=thinking)
        tokens = self._encode(text)
        return Prompt(tokens, opens_reasoning(text), tuple(tools), True, tuple(messages))

    def history(
        self, messages: Any, tools: Any, *, thinking: bool | None = None, whoever: bool = False
    ) -> Array:
        """The tokens with which every prompt begins that goes on from these messages.

        A tool's result follows calls, else something that the user says; `whoever`: either of them.
        """
        template = self._chat_template()
        messages, tools = checked_messages(messages), checked_tools(tools)
        roles = ["tool"] if messages[-1].get("tool_calls") else ["user"]
        if whoever and roles != ["user"]:
            roles.append("user")
        first, *others = (
            self._encode(
                template.render([*messages, said], tools=tools, thinking=thinking, answer=False)
            )
            for said in ({"role": role, "content": text} for role in roles for text in ("A", "0"))
        )
        return first[: min(common_length(first, other) for other in others)]

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequest: when the bundle has none.
        """
        if self.tokenizer is None:
            raise InvalidRequest("this bundle has no tokenizer.json; give token ids, not text")
        return self.tokenizer

    def _encode(self, text: str) -> Array:
        """Tokens of a conversation, of which the beginning was often seen before."""
        assert self._turns is not None
        return self._turns.encode(text)

    def _chat_template(self) -> ChatTemplate:
        tokenizer = self.needed_tokenizer()
        if self._template is None:
            if self._source is None and any(tokenizer.token_id(m) is None for m in TURN_MARKS):
                raise InvalidRequest(
                    f"this bundle has no chat template and its tokenizer lacks {TURN_MARKS[0]}; "
                    "give a text with raw=True"
                )
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            tokens = {name: tokenizer.token_text(self._first_id(f"{name}_id")) for name in names}
            self._template = ChatTemplate(self._source, tokens)
        return self._template

    def _first_id(self, name: str) -> int | None:
        value = self._generation.get(name)
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None
