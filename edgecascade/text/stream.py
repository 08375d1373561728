# SPDX-License-Identifier: Apache-2.0
"""Tokens in, what a caller sees out: text, reasoning, stop strings, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecascade.text.detokenize import Detokenizer
from edgecascade.text.reasoning import CLOSE, OPEN, ReasoningSplitter
from edgecascade.text.stops import StopStrings
from edgecascade.text.tokenizer import Tokenizer
from edgecascade.text.tools import CLOSE as TOOL_CLOSE
from edgecascade.text.tools import OPEN as TOOL_OPEN
from edgecascade.text.tools import ToolCall, ToolParser, ToolText

MARKS = (OPEN, CLOSE, "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class TextDelta:
    """What one token added."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_errors: tuple[str, ...] = ()

    def __add__(self, other: TextDelta) -> TextDelta:
        return TextDelta(
            self.text + other.text,
            self.reasoning + other.reasoning,
            self.tool_calls + other.tool_calls,
            self.tool_errors + other.tool_errors,
        )


class TextStream:
    """The text of one answer. In any cut the pieces add up to the same whole.

    In a chat the family's marks are marks wherever they stand: a stray one is not shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        opened: bool,
        chat: bool = True,
        stops: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._reasoning = ReasoningSplitter(opened=opened)
        self._stops = StopStrings(stops)
        self._tools = ToolParser(tools) if tools else None
        self._close = _ids(tokenizer, CLOSE)
        self._marks = _ids(tokenizer, *MARKS) if chat or opened else frozenset()
        self._tool_marks = _ids(tokenizer, TOOL_OPEN, TOOL_CLOSE) if tools else frozenset()

    @property
    def reasoning(self) -> bool:
        """Whether the answer is still inside its reasoning."""
        return self._reasoning.open

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached."""
        return self._stops.stopped

    def text_of(self, token: int) -> str:
        """A token's own text, wherever it stands."""
        return self._tokenizer.decode([token], skip_special=False)

    def push(self, token: int) -> TextDelta:
        """What this token adds."""
        keep = self._close if self._reasoning.open else self._tool_marks
        if token in self._marks and token not in keep:
            return TextDelta()
        return self._route(*self._reasoning.push(self._detokenizer.push(token, keep=keep)))

    def finish(self) -> TextDelta:
        """What was held back until the end."""
        rest = self._reasoning.push("" if self.stopped else self._detokenizer.flush())
        last = self._reasoning.flush()
        delta = self._route(rest[0] + last[0], rest[1] + last[1])
        tail = self._stops.flush()
        if self._tools is None:
            return delta + TextDelta(tail)
        for part in (self._tools.push(tail), self._tools.flush()):
            delta += TextDelta(part.text, "", part.calls, part.errors)
        return delta

    def _route(self, reasoning: str, content: str) -> TextDelta:
        content = self._stops.push(content) if content else ""
        part = self._tools.push(content) if self._tools and content else ToolText(content)
        return TextDelta(part.text, reasoning, part.calls, part.errors)


def _ids(tokenizer: Tokenizer, *marks: str) -> frozenset[int]:
    return frozenset(token for mark in marks if (token := tokenizer.token_id(mark)) is not None)
