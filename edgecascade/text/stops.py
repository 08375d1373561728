# SPDX-License-Identifier: Apache-2.0
"""Stop strings over a stream of text: found across any cut, and never shown."""

from __future__ import annotations

from collections.abc import Sequence


def tail_that_may_become(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning, but not the whole, of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(mark) > size and mark.startswith(tail) for mark in marks):
            return size
    return 0


class StopStrings:
    """Passes text through up to the first stop string that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that certainly comes before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        # The first to be complete wins, whatever the cut; of two that end together, the longer.
        found = min(
            ((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0),
            default=None,
        )
        if found:
            self.stopped, self._held = True, ""
            return text[: found[1]]
        held = tail_that_may_become(text, self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back in vain."""
        text, self._held = self._held, ""
        return text
