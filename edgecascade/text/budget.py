# SPDX-License-Identifier: Apache-2.0
"""The thinking budget: a rule on tokens, no feature of the model (docs/python.md)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

END = "\n\n</think>"
GRACE = 0.1  # share of the budget that may be used up while waiting for a line to end


class ThinkingBudget:
    """Closes the reasoning after `limit` tokens: at the next line break, or after the grace."""

    def __init__(self, limit: int, end: Sequence[int]) -> None:
        self._limit = limit
        self._latest = limit + math.ceil(limit * GRACE)
        self._end = end
        self._forced: deque[int] = deque()
        self._used = 0
        self._decide(at_break=True)

    def forced(self) -> int | None:
        """The token that must come next, None if the model is free."""
        return self._forced.popleft() if self._forced else None

    def count(self, text: str) -> None:
        """One more token of reasoning, and its text."""
        self._used += 1
        self._decide(at_break="\n" in text)

    def _decide(self, *, at_break: bool) -> None:
        if self._end and (self._used >= self._latest or (self._used >= self._limit and at_break)):
            self._forced.extend(self._end)
            self._end = ()
