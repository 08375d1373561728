# SPDX-License-Identifier: Apache-2.0
"""Splits a stream of text into reasoning and content at the first </think>."""

from __future__ import annotations

from edgecascade.text.stops import tail_that_may_become

OPEN = "<think>"
CLOSE = "</think>"


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends inside a reasoning block, so that the answer begins there."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Text before the first </think> is reasoning when the prompt opened it; else all is content.

    White space around the reasoning and the line breaks after </think> belong to neither.
    """

    def __init__(self, *, opened: bool) -> None:
        self.open = opened
        self._held = ""
        self._started = False  # some reasoning was emitted
        self._skip_breaks = False  # right behind </think>

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that this text adds."""
        if not self.open:
            return "", self._content(text)
        text = self._held + text
        if not self._started:
            text = text.lstrip()
        before, closed, after = text.partition(CLOSE)
        if closed:
            self.open, self._held, self._skip_breaks = False, "", True
            return before.rstrip(), self._content(after)
        solid = text[: len(text) - tail_that_may_become(text, (CLOSE,))].rstrip()
        self._held = text[len(solid) :]
        self._started = self._started or bool(solid)
        return solid, ""

    def flush(self) -> tuple[str, str]:
        """What is left when the answer ends inside the reasoning."""
        held, self._held = self._held.rstrip(), ""
        return held, ""

    def _content(self, text: str) -> str:
        if self._skip_breaks:
            text = text.lstrip("\n")
            self._skip_breaks = not text
        return text
